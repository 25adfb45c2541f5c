"""The short-axis subspace S: the steepest directions of the objective, and rounding errors in them (CET §3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.channel_split import channel_split, masks, row_owners
from lightning_caq.measures.hessian.density import SpectralDensity, known_density, with_density
from lightning_caq.measures.hessian.hutchinson import estimate_layer_traces
from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs, residual_curvature
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.batches import batch_size
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.utilities.seeding import generator


@dataclass(frozen=True)
class Energies:
    """What rounding errors Δ(b) meet of the curvature, bits to nat.

    Attributes:
        subspace_energy: Σ_j |λ_j| (v_jᵀ Δ)² over the pairs in S.
        second_order: ΔᵀHΔ, signed.
    """

    subspace_energy: dict[int, float]
    second_order: dict[int, float]


@dataclass(frozen=True)
class LayerSpectrum:
    """A layer's part of the spectrum.

    Attributes:
        trace: tr(H_ii).
        trace_stderr: Its standard error.
        subspace_curvature: Σ_j |λ_j| ‖v_j restricted to the layer‖² over the pairs in S.
        energies: Of the layer's rounding errors.
        groups: Of these at each group of channels alone; empty for a layer that is not split.
    """

    trace: float
    trace_stderr: float
    subspace_curvature: float
    energies: Energies
    groups: tuple[Energies, ...] = ()


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of the objective's Hessian.

    Attributes:
        values: λ_1, …, λ_k of the pairs that span S, shape (k,), float64.
        trace: tr(H).
        size: Number of weights, n.
        layers: Layer name to its part, for this process's layers.
        residuals: ‖H v_j − λ_j v_j‖; empty where the pairs are exact.
        kept: Share of the outputs' curvature in the rows that it was computed from.
        sampled: Rows drawn and rows that there were, where not all were taken.
        density: Where all eigenvalues lie, where they are known.
        sample_energies: Of each sample what it adds to the energies of errors at the fewest bits, shape (N,); ``None``
            where that is not known.
    """

    values: Tensor
    trace: float
    size: int
    layers: dict[str, LayerSpectrum]
    residuals: tuple[float, ...] = ()
    kept: float = 1.0
    sampled: tuple[int, int] | None = None
    density: SpectralDensity | None = None
    sample_energies: Tensor | None = None


def spectrum(measurement: Measurement) -> Spectrum:
    """By Gram matrices of gradient rows for ``distill``, by Lanczos and Hutch++ for ``task``."""
    return (_from_rows if measurement.objective.name == "distill" else _from_products)(measurement)


def _from_rows(measurement: Measurement) -> Spectrum:
    m, k = measurement, measurement.eigenpairs
    split = m.once(channel_split)
    rows = gram_spectrum(
        m.model,
        m.layers,
        m.batches,
        m.once(layer_errors),
        k=k,
        owners={x.name: row_owners(x, split[x.name]) for x in m.rank_layers if len(split.get(x.name, ())) > 1},
        seed=m.seed,
        sharing=m.sharing,
    )

    def energies(components: Mapping[int, Tensor]) -> Energies:
        return Energies(
            {b: float(c[:k].square().sum()) for b, c in components.items()},
            {b: float(c.square().sum()) for b, c in components.items()},
        )

    def groups(name: str) -> tuple[Energies, ...]:
        parts = rows.parts.get(name, {})
        count = len(split[name]) if parts else 0
        return tuple(energies({b: part[:, i] for b, part in parts.items()}) for i in range(count))

    layers = {
        name: LayerSpectrum(
            trace=rows.traces[name],
            trace_stderr=rows.errors[name],
            subspace_curvature=rows.energies[name],
            energies=energies(components),
            groups=groups(name),
        )
        for name, components in rows.projected.items()
    }
    size = sum(layer.weights for layer in m.layers)
    sampled = (rows.rows, rows.candidates) if rows.rows < rows.candidates else None
    # Single eigenvalues of rows that were drawn are not those of the Hessian.
    density = None if sampled else known_density(rows.values, size)
    first = torch.tensor([0, *map(batch_size, m.batches)]).cumsum(0)
    places = torch.tensor([int(first[row.batch]) + row.sample for row in rows.chosen])
    return Spectrum(
        values=rows.values[:k],
        trace=rows.trace,
        size=size,
        layers=layers,
        kept=rows.kept,
        sampled=sampled,
        density=density,
        sample_energies=torch.zeros(int(first[-1]), dtype=torch.float64).index_add(0, places, rows.squares),
    )


def _from_products(measurement: Measurement) -> Spectrum:
    m, split, errors = measurement, measurement.once(channel_split), measurement.once(layer_errors)
    with folded_hessian(m.model, m.layers, m.objective, sharing=m.sharing) as hessian:
        pairs = leading_pairs(hessian, m.eigenpairs, m.seed)
        traces = estimate_layer_traces(hessian, [generator(m.seed, f"trace/{x.name}") for x in m.layers])
        sizes = hessian.sizes
    magnitude, trace = pairs.values.abs(), float(traces.values.sum())
    outside = residual_curvature(trace, pairs.values, sum(sizes))

    def energies(part: Tensor, deltas: Mapping[int, Tensor]) -> Energies:
        short, whole = {}, {}
        for b, delta in deltas.items():
            along = (part.T @ delta.flatten()).double().square().cpu()
            rest = outside * (float(delta.double().square().sum()) - float(along.sum()))
            short[b], whole[b] = float(magnitude @ along), float(pairs.values @ along) + rest
        return Energies(short, whole)

    layers = {}
    for i, (layer, part) in enumerate(zip(m.layers, pairs.vectors.split(sizes), strict=True)):
        if layer.name not in errors:
            continue
        deltas, groups = errors[layer.name], split.get(layer.name, ())
        layers[layer.name] = LayerSpectrum(
            trace=float(traces.values[i]),
            trace_stderr=float(traces.errors[i]),
            subspace_curvature=float((magnitude * part.double().square().sum(0).cpu()).sum()),
            energies=energies(part, deltas),
            groups=tuple(
                energies(part, {b: d * mask.to(d) for b, d in deltas.items()})
                for mask in (masks(layer, groups) if len(groups) > 1 else ())
            ),
        )
    return Spectrum(pairs.values, trace, sum(sizes), layers, residuals=tuple(pairs.residuals.tolist()))


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Eigenvalues, traces, and the energies of the rounding errors."""
    whole = measurement.once(spectrum)
    profile = replace(
        profile,
        eigenvalues=tuple(whole.values.tolist()),
        trace=whole.trace,
        residual_curvature=residual_curvature(whole.trace, whole.values, whole.size),
        eigenvalue_residuals=whole.residuals,
        kept=whole.kept,
        sampled=whole.sampled,
    )
    if whole.density is not None:
        profile = with_density(profile, whole.density)

    def fill(row: LayerCurvature) -> LayerCurvature:
        part = whole.layers[row.name]
        return replace(
            row,
            trace=part.trace,
            trace_stderr=part.trace_stderr,
            subspace_curvature=part.subspace_curvature,
            subspace_energy=part.energies.subspace_energy,
            second_order=part.energies.second_order,
        )

    return profile.with_rows(fill)


def _cost(extent: Extent) -> Cost:
    if extent.distill:
        return Cost(row_passes=1, row_products=True)
    # Lanczos takes 2.4 products an eigenpair, each of two gradients; traces take 6 products with every layer's block.
    return Cost(5.0 * extent.eigenpairs + 12.0 * extent.layers)


MEASURE = Measure(
    "subspace",
    step="eigenspace of the Hessian",
    take=take,
    cost=_cost,
    needs=frozenset({"rounding_error"}),
    aliases=("trace",),
    collective=True,
)
