"""Curvature-guided mixed-precision quantization for PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from lightning_caq.allocation.methods import available_methods, register_method
from lightning_caq.export.latency import Latency, benchmark
from lightning_caq.export.onnx import OnnxExport, export_onnx
from lightning_caq.export.packed import load_quantized, save_quantized
from lightning_caq.measures.measure import measure
from lightning_caq.pipeline import QuantizationResult, quantize
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport

if TYPE_CHECKING:
    from lightning_caq.callback import CurvatureQuantizationCallback

__all__ = [
    "CurvatureProfile",
    "CurvatureQuantizationCallback",
    "Latency",
    "OnnxExport",
    "QuantizationPlan",
    "QuantizationReport",
    "QuantizationResult",
    "available_methods",
    "benchmark",
    "export_onnx",
    "load_quantized",
    "measure",
    "quantize",
    "register_method",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds and 200 MB to import; ``quantize()`` works without it.
    if name == "CurvatureQuantizationCallback":
        from lightning_caq.callback import CurvatureQuantizationCallback

        return CurvatureQuantizationCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
