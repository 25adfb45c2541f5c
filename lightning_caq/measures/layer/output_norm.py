"""The output norm: how large a layer's outputs are."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_caq.measures.layer.blocks import Block, measured_blocks
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.profile import CurvatureProfile


def output_norm(block: Block) -> float:
    """Root mean square over samples of ‖f_i(z_i)‖, of the layer and what directly follows it; a word's, of a table."""
    with torch.no_grad():
        outputs = block(block.inputs)
    rows = outputs.flatten(0, -2) if block.layer.kind == "embedding" else outputs.flatten(1)
    return float(rows.double().square().sum(1).mean().sqrt())


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The output norm of every layer; 0 where the first batch does not reach it."""
    blocks = measurement.once(measured_blocks)
    return profile.with_rows(
        lambda row: replace(row, output_norm=output_norm(blocks[row.name]) if row.name in blocks else 0.0)
    )


MEASURE = Measure("output_norm", step="curvature and Lipschitz constants", take=take)
