"""Steps: each takes one group of measures and fills its figures into the rows of the profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.batches import take_samples
from lightning_caq.layers import Layer
from lightning_caq.measures.blocks import record_blocks
from lightning_caq.measures.curvature import rademacher_sensitivity, remainder, second_order_sensitivity
from lightning_caq.measures.folding import batchnorm_folded
from lightning_caq.measures.gram import gram_spectrum
from lightning_caq.measures.hessian import Hessian
from lightning_caq.measures.hutchinson import estimate_layer_traces
from lightning_caq.measures.lanczos import lanczos
from lightning_caq.measures.lipschitz import lipschitz, local_lipschitz
from lightning_caq.measures.rounding_errors import (
    amplification,
    input_statistics,
    loss_change,
    output_errors,
)
from lightning_caq.measures.sensitivity import fisher_diagonals, gauss_newton_diagonals, gradient_norms, top_eigenvalues
from lightning_caq.objective import Objective
from lightning_caq.seeding import generator

BLOCK_SAMPLES = 256
# A prediction of the loss change that is off by more than half, and by more than noise, is outside the model's range.
VALIDITY_TOLERANCE = 0.5
VALIDITY_FLOOR = 1e-3
NEARLY_ALL = 1e-3

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
            continue
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
    for layer in layers:
        statistics = input_statistics(model, layer, batches)
        rows[layer.name].update(input_norm=statistics.norm, diameter=statistics.diameter)


def slopes(
    model: nn.Module, layers: Sequence[Layer], target: Objective, needs: frozenset[str], seed: int, rows: Rows
) -> None:
    """Gradient norms and top eigenvalues."""
    if "gradient_norm" in needs:
        for name, norm in gradient_norms(model, layers, target).items():
            rows[name]["gradient_norm"] = norm
    if "top_eigenvalue" in needs:
        for name, (value, residual) in top_eigenvalues(model, layers, target, seed=seed).items():
            rows[name].update(top_eigenvalue=value, top_eigenvalue_residual=residual)


def rounding(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    deltas: Deltas,
    needs: frozenset[str],
    rows: Rows,
) -> None:
    """What rounding does to weights and to outputs."""
    batches = target.batches
    if "diagonal" in needs:
        distill = target.name == "distill"
        diagonals = (
            gauss_newton_diagonals(model, layers, batches)[0] if distill else fisher_diagonals(model, layers, target)
        )
        for name, diagonal in diagonals.items():
            energies = {b: float((diagonal * d.square()).double().sum()) for b, d in deltas[name].items()}
            rows[name]["diagonal_energy"] = energies
    for layer in layers:
        row, errors = rows[layer.name], deltas[layer.name]
        row["rounding_error"] = {b: float(d.double().square().sum()) for b, d in errors.items()}
        if "output_error" in needs:
            row["output_error"] = output_errors(model, layer, batches, errors)
        if "amplification" in needs:
            # One Jacobian–vector product a layer, along the error at the middle bit-width.
            middle = sorted(errors)[(len(errors) - 1) // 2]
            row["amplification"] = amplification(model, layer, batches, errors[middle])


def gram(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, k: int, seed: int, rows: Rows
) -> dict[str, Any]:
    """Spectrum, traces and energies of the distill Hessian, by Gram matrices."""
    spectrum = gram_spectrum(model, layers, target.batches, deltas, k=k)
    for name, row in rows.items():
        row.update(trace=spectrum.traces[name], subspace_curvature=spectrum.energies[name])
        row["trace_stderr"] = 0.0 if spectrum.kept > 1 - NEARLY_ALL else None
        row["subspace_energy"] = {b: float(p[:k].square().sum()) for b, p in spectrum.projected[name].items()}
        row["second_order"] = {b: float(p.square().sum()) for b, p in spectrum.projected[name].items()}
    trace, n = sum(spectrum.traces.values()), sum(layer.weights for layer in layers)
    return {**_spectrum_fields(spectrum.values[:k], trace, n), "kept": spectrum.kept}


def task_hessian(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, k: int, seed: int, rows: Rows
) -> dict[str, Any]:
    """Spectrum, traces and energies of the task Hessian, by Lanczos and Hutch++."""
    with batchnorm_folded(model, layers, target.batches[0]):
        operator = Hessian(model, layers, target)
        start = operator.like(torch.randn(operator.size, generator=generator(seed, "lanczos")))
        pairs = lanczos(operator.product, start, min(k, operator.size))
        traces = estimate_layer_traces(operator, [generator(seed, f"trace/{x.name}") for x in layers])
    magnitude = pairs.values.abs()
    whole = _spectrum_fields(pairs.values, float(traces.values.sum()), operator.size)
    for i, (layer, part) in enumerate(zip(layers, pairs.vectors.split(operator.sizes), strict=True)):
        row = rows[layer.name]
        row.update(trace=float(traces.values[i]), trace_stderr=float(traces.errors[i]))
        row["subspace_curvature"] = float((magnitude * part.double().square().sum(0).cpu()).sum())
        along = {b: (part.T @ d.flatten()).double().square().cpu() for b, d in deltas[layer.name].items()}
        row["subspace_energy"] = {b: float(magnitude @ p) for b, p in along.items()}
        rest = {b: whole["residual_curvature"] * (row["rounding_error"][b] - float(p.sum())) for b, p in along.items()}
        row["second_order"] = {b: float(pairs.values @ p) + rest[b] for b, p in along.items()}
    return {**whole, "eigenvalue_residuals": tuple(pairs.residuals.tolist())}


def _spectrum_fields(values: Tensor, trace: float, n: int) -> dict[str, Any]:
    outside = max(trace - float(values.sum()), 0.0) / max(n - len(values), 1)
    return {"eigenvalues": tuple(values.tolist()), "trace": trace, "residual_curvature": outside}


def validity(model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, rows: Rows) -> None:
    """Walk up the bit-widths of each layer until the quadratic model holds (CET Eq. 7); below, measured changes count.

    The error shrinks with every bit, so a model that holds at one bit-width is taken to hold at the larger ones.
    """
    reference = target.value(model)
    # The distill objective is at its minimum: its gradient is zero.
    slopes = dict.fromkeys(rows, None) if target.name == "distill" else _gradient(model, layers, target)
    for layer in layers:
        row, errors, slope = rows[layer.name], deltas[layer.name], slopes[layer.name]
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


def _gradient(model: nn.Module, layers: Sequence[Layer], target: Objective) -> dict[str, Tensor]:
    gradient = Hessian(model, layers, target).gradient()
    return {layer.name: part for layer, part in zip(layers, gradient, strict=True)}
