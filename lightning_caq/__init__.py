"""Curvature-guided mixed-precision quantization for PyTorch Lightning."""

from lightning_caq.callback import CurvatureQuantizationCallback
from lightning_caq.evaluation.report import QuantizationReport
from lightning_caq.measures.measure import measure
from lightning_caq.measures.profile import CurvatureProfile
from lightning_caq.pipeline import QuantizationResult, quantize
from lightning_caq.plan import QuantizationPlan

__all__ = [
    "CurvatureProfile",
    "CurvatureQuantizationCallback",
    "QuantizationPlan",
    "QuantizationReport",
    "QuantizationResult",
    "measure",
    "quantize",
]
