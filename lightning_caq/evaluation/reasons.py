"""Reasons: why each layer has its bits, by what the method that gave them predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_caq.allocation.methods import AllocationMethod, get_method, is_search
from lightning_caq.allocation.steps import sensitivities
from lightning_caq.plan import LayerPlan, QuantizationPlan
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.sizes import average_bits
from lightning_caq.studies import LayerReason

_QUARTER = 4.0  # what squared errors fall to with one more bit, as a divisor


def reasons(
    method: str, profile: CurvatureProfile, bits: Sequence[int], plan: QuantizationPlan
) -> tuple[LayerReason, ...]:
    """One reason a layer, in the order of the plan.

    Damage at a layer's own width and at the candidates on either side, the same for all groups of its channels; where
    codes are entropy-coded, at its step and at half and double that, which are about a bit apart.

    Args:
        method: The method that was asked for. Where uniform bits were taken in the end, it is what it predicts of them.
        profile: What was measured.
        bits: The candidate bit-widths.
        plan: The plan.
    """
    found = get_method(method)
    if is_search(found) or not found.needs:
        source = "searched" if is_search(found) else "uniform"
        return tuple(_unknown(method, x, profile[x.name].weights, source) for x in plan.layers)
    if any(isinstance(x.grid, SteppedGrid) for x in plan.layers):
        slopes = dict(zip((row.name for row in profile.layers), sensitivities(method, profile, bits), strict=True))
        return tuple(_of_step(method, x, profile[x.name].weights, float(slopes[x.name])) for x in plan.layers)
    return tuple(_of_width(method, found, profile, x, bits) for x in plan.layers)


def _of_width(
    method: str, found: AllocationMethod, profile: CurvatureProfile, layer: LayerPlan, bits: Sequence[int]
) -> LayerReason:
    """The reason for a bit-width, or for those of a layer's groups of channels."""
    row, width = profile[layer.name], layer.grid.width
    if isinstance(width, tuple):
        parts = [(group.row, int(width[group.channels[0]])) for group in row.groups]
    else:
        parts = [(row, int(width))]
    steps = {by: [_beside(b, bits, by) for _, b in parts] for by in (-1, 0, 1)}
    tables = {id(part): _costs(found, replace(profile, layers=(part,)), bits) for part, _ in parts}
    totals = {
        by: None if None in at else sum(tables[id(part)][b] for (part, _), b in zip(parts, at, strict=True) if b)
        for by, at in steps.items()
    }
    widths = {by: None if None in at else float(np.average([b for b in at if b], weights=[p.weights for p, _ in parts]))
              for by, at in steps.items()}  # fmt: skip
    measured = {_is_measured(found, part, b) for part, b in parts}
    source = "partly measured" if len(measured) > 1 else "measured" if measured == {True} else "modelled"
    return LayerReason(
        name=row.name,
        method=method,
        unit=getattr(found, "unit", "nat" if getattr(found, "in_nat", False) else ""),
        bits=average_bits(width),
        fewer=widths[-1],
        more=widths[1],
        damage=totals[0],
        damage_fewer=totals[-1],
        damage_more=totals[1],
        weights=row.weights,
        source=source,
    )


def _of_step(method: str, layer: LayerPlan, weights: int, slope: float) -> LayerReason:
    """The reason for a step: damage goes with the squared error."""
    b = average_bits(layer.grid.width)
    damage = None if layer.distortion is None else slope * layer.distortion * weights
    found = get_method(method)
    return replace(
        _unknown(method, layer, weights, "modelled"),
        unit=getattr(found, "unit", "nat" if getattr(found, "in_nat", False) else ""),
        fewer=max(b - 1, 0.0),
        more=b + 1,
        damage=damage,
        damage_fewer=None if damage is None else damage * _QUARTER,
        damage_more=None if damage is None else damage / _QUARTER,
    )


def _unknown(method: str, layer: LayerPlan, weights: int, source: str) -> LayerReason:
    return LayerReason(
        name=layer.name,
        method=method,
        unit="",
        bits=average_bits(layer.grid.width),
        fewer=None,
        more=None,
        damage=None,
        damage_fewer=None,
        damage_more=None,
        weights=weights,
        source=source,
    )


def _costs(found: AllocationMethod, profile: CurvatureProfile, bits: Sequence[int]) -> Mapping[int, float]:
    return dict(zip(bits, map(float, found.costs(profile, bits)[0]), strict=True))


def _beside(b: int, bits: Sequence[int], by: int) -> int | None:
    place = list(bits).index(b) + by
    return bits[place] if 0 <= place < len(bits) else None


def _is_measured(found: AllocationMethod, row: LayerCurvature, b: int) -> bool:
    """Whether a cost is that of the network itself with this layer rounded, not of a model of it."""
    return getattr(found, "measured", False) or ("loss_change" in found.needs and b in row.outside)
