"""Steps: each takes one group of measures and fills its figures into the rows of the profile.

Where several processes share the work, a rank fills the rows of its own layers only: those that a step is given, or, in
a step about the whole network, those that have errors in ``deltas``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian.density import SpectralDensity, known_density, spectral_density
from lightning_caq.measures.hessian.folding import batchnorm_folded
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.hutchinson import estimate_layer_traces
from lightning_caq.measures.hessian.lanczos import lanczos
from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.curvature import rademacher_sensitivity, remainder, second_order_sensitivity
from lightning_caq.measures.layer.graph import lipschitz_amplification
from lightning_caq.measures.layer.lipschitz import lipschitz, local_lipschitz
from lightning_caq.measures.layer.magnitudes import output_norm, weight_range
from lightning_caq.measures.rounding.activation_costs import activation_costs
from lightning_caq.measures.rounding.bias_correction import bias_corrections
from lightning_caq.measures.rounding.carried import carried_errors
from lightning_caq.measures.rounding.channel_groups import masks, row_owners, start_groups
from lightning_caq.measures.rounding.distribution import distribution_distance
from lightning_caq.measures.rounding.rounding_errors import (
    input_statistics,
    loss_change,
    output_errors,
)
from lightning_caq.measures.rounding.scale_importance import scale_importance
from lightning_caq.measures.sensitivity import (
    fisher_diagonals,
    gauss_newton_diagonals,
    gradient_norms,
    quantized_kl,
    top_eigenvalues,
)
from lightning_caq.network.batches import take_samples
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.utilities.seeding import generator
from lightning_caq.utilities.sharing import Sharing

BLOCK_SAMPLES = 256
# A prediction of the loss change that is off by more than half, and by more than noise, is outside the model's range.
VALIDITY_TOLERANCE = 0.5
VALIDITY_FLOOR = 1e-3
DENSITY_PROBES, DENSITY_STEPS = 4, 32

Deltas = Mapping[str, Mapping[int, Tensor]]
Rows = dict[str, dict[str, Any]]


def blocks(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], needs: frozenset[str], seed: int, rows: Rows
) -> None:
    """κ, ρ, L and their kin, of each layer with what directly follows it, on a few samples."""
    recorded = record_blocks(model, layers, take_samples(batches[:1], BLOCK_SAMPLES)[0])
    for layer in layers:
        block, row = recorded.get(layer.name), rows[layer.name]
        if block is None:
            row.update(kappa=0.0, kappa_tolerance=0.0, lipschitz=0.0, lipschitz_tolerance=0.0, remainder=0.0)
            row["output_norm"] = 0.0
            continue
        row["output_norm"] = output_norm(block)
        if "lipschitz" in needs or layer.kind == "embedding":
            row["lipschitz"], row["lipschitz_tolerance"] = lipschitz(block, generator(seed, f"lipschitz/{layer.name}"))
        if "local_lipschitz" in needs:
            draws = generator(seed, f"local_lipschitz/{layer.name}")
            row["local_lipschitz"], row["local_lipschitz_tolerance"] = local_lipschitz(block, draws)
        if not needs & {"kappa", "kappa_mean"}:
            continue
        if layer.kind == "embedding":
            # Linear in its one-hot words: κ = 2 σ_max² in closed form, and nothing is left beyond first order.
            row.update(kappa=2 * row["lipschitz"] ** 2, kappa_tolerance=2 * row["lipschitz_tolerance"], remainder=0.0)
        else:
            draws = generator(seed, f"kappa/{layer.name}")
            row["kappa"], row["kappa_tolerance"] = second_order_sensitivity(block, draws)
            row["remainder"] = remainder(block, draws)
            if "kappa_mean" in needs:
                row["kappa_mean"], row["kappa_mean_stderr"] = rademacher_sensitivity(block, draws)


def inputs(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], rows: Rows) -> None:
    """Size and spread of every layer's inputs."""
    for name, statistics in input_statistics(model, layers, batches).items():
        rows[name].update(input_norm=statistics.norm, diameter=statistics.diameter)


def rounded_inputs(
    model: nn.Module, layers: Sequence[Layer], target: Objective, bits: Sequence[int], rows: Rows
) -> None:
    """What rounding the input of each layer alone costs."""
    if not layers:
        return
    costs = activation_costs(model, layers, target.batches, target, bits)
    for layer, each in zip(layers, costs.tolist(), strict=True):
        rows[layer.name]["activation_cost"] = dict(zip(bits, each, strict=True))


def graph(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], seed: int, rows: Rows) -> dict[str, Any]:
    """Amplification by Lipschitz constants along the graph that the first batch draws."""
    bounds = lipschitz_amplification(model, layers, batches[0], generator(seed, "lipschitz_amplification"))
    for name, gain in bounds.layers.items():
        rows[name]["lipschitz_amplification"] = gain
    return {"input_lipschitz": bounds.input}


def slopes(
    model: nn.Module, layers: Sequence[Layer], target: Objective, needs: frozenset[str], seed: int, rows: Rows
) -> None:
    """Gradient norms and top eigenvalues."""
    if not layers:
        return
    if "gradient_norm" in needs:
        for name, norm in gradient_norms(model, layers, target).items():
            rows[name]["gradient_norm"] = norm
        if target.name == "distill":
            for name, diagonal in gauss_newton_diagonals(model, layers, target.batches, seed=seed)[0].items():
                rows[name]["score_norm"] = float(diagonal.double().sum().sqrt())
    if "top_eigenvalue" in needs:
        for name, (value, residual) in top_eigenvalues(model, layers, target, seed=seed).items():
            rows[name].update(top_eigenvalue=value, top_eigenvalue_residual=residual)


def rounding(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    deltas: Deltas,
    needs: frozenset[str],
    seed: int,
    rows: Rows,
) -> None:
    """What rounding does to weights and to outputs."""
    batches = target.batches
    mine = [layer for layer in layers if layer.name in deltas]
    if not mine:
        return
    if "kl" in needs:
        for name, kl in quantized_kl(model, mine, batches, deltas).items():
            rows[name]["kl"] = kl
    if "scale_importance" in needs:
        bits = sorted(deltas[mine[0].name])
        for name, scales in scale_importance(model, layers, batches, bits, seed=seed).items():
            rows[name]["scale_importance"] = scales
    if needs & {"diagonal", "channel_groups"}:
        distill = target.name == "distill"
        diagonals = (
            gauss_newton_diagonals(model, mine, batches, seed=seed)[0]
            if distill
            else fisher_diagonals(model, mine, target)
        )
        for name, diagonal in diagonals.items():
            energies = {b: float((diagonal * d.square()).double().sum()) for b, d in deltas[name].items()}
            rows[name]["diagonal_energy"] = energies
        if "channel_groups" in needs:
            for layer in mine:
                rows[layer.name]["groups"] = start_groups(layer, diagonals[layer.name], deltas[layer.name])
    if "amplification" in needs:
        shifts = bias_corrections(model, mine, batches, deltas)
        carried = carried_errors(model, mine, batches, deltas, shifts, seed=seed)
        for name, before in carried.errors.items():
            rows[name]["carried_error"] = {b: carried.at_output(name, b) for b in before}
            # One number for all bit-widths: the gain along the error at the middle one.
            middle = sorted(before)[(len(before) - 1) // 2]
            gain = carried.at_output(name, middle) / before[middle] if before[middle] > 0 else 0.0
            rows[name]["amplification"] = gain
    if "output_error" in needs:
        for name, found in output_errors(model, mine, batches, deltas).items():
            rows[name]["output_error"] = found
    for layer in mine:
        row, errors = rows[layer.name], deltas[layer.name]
        row["rounding_error"] = {b: float(d.double().square().sum()) for b, d in errors.items()}
        row["weight_range"] = weight_range(model, layer)
        if "distribution_distance" in needs:
            row["distribution_distance"] = distribution_distance(layer_weight(model, layer), errors)


def gram(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    deltas: Deltas,
    k: int,
    seed: int,
    rows: Rows,
    sharing: Sharing,
) -> dict[str, Any]:
    """Spectrum, its density, traces and energies of the distill Hessian, by Gram matrices."""
    split = {x.name: row_owners(x, tuple(groups)) for x in layers if (groups := _groups(rows, x.name))}
    spectrum = gram_spectrum(model, layers, target.batches, deltas, k=k, owners=split, seed=seed, sharing=sharing)
    for name in deltas:
        row = rows[name]
        row.update(trace=spectrum.traces[name], subspace_curvature=spectrum.energies[name])
        row["trace_stderr"] = spectrum.errors[name]
        row["subspace_energy"] = {b: float(p[:k].square().sum()) for b, p in spectrum.projected[name].items()}
        row["second_order"] = {b: float(p.square().sum()) for b, p in spectrum.projected[name].items()}
        for i, figures in enumerate(_groups(rows, name).values()):
            parts = {b: p[:, i].square() for b, p in spectrum.parts[name].items()}
            figures["subspace_energy"] = {b: float(p[:k].sum()) for b, p in parts.items()}
            figures["second_order"] = {b: float(p.sum()) for b, p in parts.items()}
    n = sum(layer.weights for layer in layers)
    sampled = (spectrum.rows, spectrum.candidates) if spectrum.rows < spectrum.candidates else None
    whole = {**_spectrum_fields(spectrum.values[:k], spectrum.trace, n), "kept": spectrum.kept, "sampled": sampled}
    # Single eigenvalues of rows that were drawn are not those of the Hessian.
    return whole if sampled else {**whole, **_density_fields(known_density(spectrum.values, n))}


def task_hessian(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    deltas: Deltas,
    k: int,
    seed: int,
    rows: Rows,
    sharing: Sharing,
) -> dict[str, Any]:
    """Spectrum, traces and energies of the task Hessian, by Lanczos and Hutch++."""
    with batchnorm_folded(model, layers, target.batches[0]):
        operator = Hessian(model, layers, target, sharing=sharing)
        start = operator.like(torch.randn(operator.size, generator=generator(seed, "lanczos")))
        pairs = lanczos(operator.product, start, min(k, operator.size))
        traces = estimate_layer_traces(operator, [generator(seed, f"trace/{x.name}") for x in layers])
    magnitude = pairs.values.abs()
    whole = _spectrum_fields(pairs.values, float(traces.values.sum()), operator.size)
    for i, (layer, part) in enumerate(zip(layers, pairs.vectors.split(operator.sizes), strict=True)):
        if layer.name not in deltas:
            continue
        row = rows[layer.name]
        row.update(trace=float(traces.values[i]), trace_stderr=float(traces.errors[i]))
        row["subspace_curvature"] = float((magnitude * part.double().square().sum(0).cpu()).sum())
        groups = _groups(rows, layer.name)
        split = masks(layer, tuple(groups)) if groups else []
        for figures, mask in zip((row, *groups.values()), (None, *split), strict=True):
            figures["subspace_energy"], figures["second_order"] = {}, {}
            for b, d in deltas[layer.name].items():
                error = d if mask is None else d * mask.to(d)
                along = (part.T @ error.flatten()).double().square().cpu()
                rest = whole["residual_curvature"] * (figures["rounding_error"][b] - float(along.sum()))
                figures["subspace_energy"][b] = float(magnitude @ along)
                figures["second_order"][b] = float(pairs.values @ along) + rest
    return {**whole, "eigenvalue_residuals": tuple(pairs.residuals.tolist())}


def _groups(rows: Rows, name: str) -> dict[tuple[int, ...], dict[str, Any]]:
    """Figures by the channels of each group; nothing where a layer is one group or groups were not asked for."""
    return rows[name].get("groups") or {}


def density(
    model: nn.Module, layers: Sequence[Layer], target: Objective, seed: int, sharing: Sharing
) -> dict[str, Any]:
    """Spectral density of the objective's Hessian, by stochastic Lanczos quadrature."""
    with batchnorm_folded(model, layers, target.batches[0]):
        operator = Hessian(model, layers, target, sharing=sharing)
        like, draws = operator.like(torch.zeros(operator.size)), generator(seed, "density")
        found = spectral_density(operator.product, like, draws, probes=DENSITY_PROBES, steps=DENSITY_STEPS)
    return _density_fields(found)


def _density_fields(found: SpectralDensity) -> dict[str, Any]:
    grid, heights, errors = (tuple(x.tolist()) for x in found.curve())
    return {"density": (grid, heights), "density_stderr": errors}


def _spectrum_fields(values: Tensor, trace: float, n: int) -> dict[str, Any]:
    outside = max(trace - float(values.sum()), 0.0) / max(n - len(values), 1)
    return {"eigenvalues": tuple(values.tolist()), "trace": trace, "residual_curvature": outside}


def validity(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, rows: Rows, sharing: Sharing
) -> None:
    """Walk up the bit-widths of each layer until the quadratic model holds (CET Eq. 7); below, measured changes count.

    The error shrinks with every bit, so a model that holds at one bit-width is taken to hold at the larger ones.
    """
    reference = target.value(model)
    # The distill objective is at its minimum: its gradient is zero.
    slopes = dict.fromkeys(rows, None) if target.name == "distill" else _gradient(model, layers, target, sharing)
    for layer in (x for x in layers if x.name in deltas):
        errors, slope = deltas[layer.name], slopes[layer.name]
        _walk(model, layer, target, errors, slope, reference, rows[layer.name])
        groups = _groups(rows, layer.name)
        for mask, figures in zip(masks(layer, tuple(groups)) if groups else (), groups.values(), strict=True):
            masked = {b: d * mask.to(d) for b, d in errors.items()}
            _walk(model, layer, target, masked, slope, reference, figures)


def _walk(
    model: nn.Module,
    layer: Layer,
    target: Objective,
    errors: Mapping[int, Tensor],
    slope: Tensor | None,
    reference: float,
    row: dict[str, Any],
) -> None:
    """Measure the change at one bit-width after the other until the model predicts it."""
    row["loss_change"], outside = {}, []
    row["first_order"] = {b: 0.0 if slope is None else float((slope * d).sum()) for b, d in errors.items()}
    for b in sorted(errors):
        actual = loss_change(model, layer, target, errors[b], reference)
        row["loss_change"][b] = actual
        predicted = row["first_order"][b] + 0.5 * row["second_order"][b]
        if abs(actual - predicted) <= max(VALIDITY_TOLERANCE * abs(actual), VALIDITY_FLOOR):
            break
        outside.append(b)
    row["outside"] = tuple(outside)


def _gradient(model: nn.Module, layers: Sequence[Layer], target: Objective, sharing: Sharing) -> dict[str, Tensor]:
    gradient = Hessian(model, layers, target, sharing=sharing).gradient()
    return {layer.name: part for layer, part in zip(layers, gradient, strict=True)}
