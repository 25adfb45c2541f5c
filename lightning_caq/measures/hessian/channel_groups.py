"""Channel groups: what the rounding errors of groups of output channels cost, as if each were a layer."""

from __future__ import annotations

from dataclasses import replace

from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.hessian.channel_split import (
    MOST_GROUPS,
    channel_split,
    channel_sums,
    group_sums,
    masks,
    owners,
)
from lightning_caq.measures.hessian.diagonal import layer_diagonals
from lightning_caq.measures.hessian.loss_change import with_changes
from lightning_caq.measures.hessian.loss_sample import changes_cost
from lightning_caq.measures.hessian.subspace import spectrum
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.layers import Layer
from lightning_caq.profile import ChannelGroup, CurvatureProfile, LayerCurvature


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The groups of every layer; the one of a layer that is not split is the layer itself."""
    split, layers = measurement.once(channel_split), {x.name: x for x in measurement.rank_layers}

    def fill(row: LayerCurvature) -> LayerCurvature:
        groups = split[row.name]
        rows = _group_rows(measurement, layers[row.name], row) if len(groups) > 1 else [row]
        return replace(row, groups=tuple(map(ChannelGroup, groups, rows)))

    return profile.with_rows(fill)


def _group_rows(measurement: Measurement, layer: Layer, row: LayerCurvature) -> list[LayerCurvature]:
    """A row a group; trace and subspace curvature are the layer's, shared out by the diagonal."""
    groups = measurement.once(channel_split)[layer.name]
    energies = measurement.once(spectrum).layers[layer.name].groups
    errors, diagonal = measurement.once(layer_errors)[layer.name], measurement.once(layer_diagonals)[layer.name]
    owner = owners(groups)
    squares = {b: group_sums(channel_sums(layer, d.square()), owner) for b, d in errors.items()}
    weighted = {b: group_sums(channel_sums(layer, diagonal * d.square()), owner) for b, d in errors.items()}
    curvature = group_sums(channel_sums(layer, diagonal), owner)
    whole = float(curvature.sum())
    rows = []
    for i, (channels, mask) in enumerate(zip(groups, masks(layer, groups), strict=True)):
        share = float(curvature[i]) / whole if whole > 0 else len(channels) / layer.channels
        part = LayerCurvature(
            name=f"{layer.name}/{i}",
            weights=layer.weights // layer.channels * len(channels),
            channels=len(channels),
            macs=-(-layer.macs * len(channels) // layer.channels),
            rounding_error={b: float(sums[i]) for b, sums in squares.items()},
            diagonal_energy={b: float(sums[i]) for b, sums in weighted.items()},
            trace=share * (row.trace or 0.0),
            subspace_curvature=share * (row.subspace_curvature or 0.0),
            subspace_energy=energies[i].subspace_energy,
            second_order=energies[i].second_order,
        )
        if row.loss_change:
            part = with_changes(measurement, layer, part, {b: d * mask.to(d) for b, d in errors.items()})
        rows.append(part)
    return rows


def _cost(extent: Extent) -> Cost:
    # Each is tried alone.
    return changes_cost(extent, extent.layers * MOST_GROUPS) if "loss_change" in extent.needs else Cost()


MEASURE = Measure(
    "channel_groups",
    step="channel groups",
    take=take,
    cost=_cost,
    needs=frozenset({"rounding_error", "diagonal", "subspace"}),
    after=frozenset({"loss_change"}),
)
