"""Amplification: how much of a layer's output error arrives at the network's output (CAQ 2.3)."""

from __future__ import annotations

from dataclasses import replace

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.bias_correction import bias_corrections
from lightning_caq.measures.rounding.carried import carried_errors
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """A_i(b) e_i(b) at every bit-width, and A_i."""
    m, layers, errors = measurement, measurement.rank_layers, measurement.once(layer_errors)
    shifts = bias_corrections(m.model, layers, m.batches, errors)
    carried = carried_errors(m.model, layers, m.batches, errors, shifts, seed=m.seed)

    def fill(row: LayerCurvature) -> LayerCurvature:
        before = carried.errors[row.name]
        arrived = {b: carried.at_output(row.name, b) for b in errors[row.name]}
        # One number for all bit-widths: the gain along the error at the middle one.
        middle = sorted(arrived)[(len(arrived) - 1) // 2]
        gain = arrived[middle] / before[middle] if before[middle] > 0 else 0.0
        return replace(row, carried_error=arrived, amplification=gain)

    return profile.with_rows(fill)


MEASURE = Measure(
    "amplification",
    step="rounding errors",
    take=take,
    cost=lambda extent: Cost(10.0),
    needs=frozenset({"rounding_error"}),
)
