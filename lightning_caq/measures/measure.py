"""measure(): everything that was asked for, of every layer, as one profile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_caq.batches import take_samples
from lightning_caq.contexts import InFloat32, curvature_safe
from lightning_caq.errors import OptionError
from lightning_caq.fingerprint import fingerprint
from lightning_caq.isolation import preserved
from lightning_caq.layers import Layer, layer_weight
from lightning_caq.measures.blocks import record_blocks
from lightning_caq.measures.curvature import rademacher_sensitivity, remainder, second_order_sensitivity
from lightning_caq.measures.folding import batchnorm_folded
from lightning_caq.measures.gram import gram_spectrum
from lightning_caq.measures.hessian import Hessian
from lightning_caq.measures.hutchinson import estimate_layer_traces
from lightning_caq.measures.lanczos import lanczos
from lightning_caq.measures.lipschitz import lipschitz, local_lipschitz
from lightning_caq.measures.profile import CurvatureProfile, LayerCurvature
from lightning_caq.measures.rounding_errors import (
    amplification,
    input_statistics,
    loss_change,
    nearest_errors,
    output_errors,
)
from lightning_caq.measures.sensitivity import fisher_diagonals, gauss_newton_diagonals, gradient_norms, top_eigenvalues
from lightning_caq.objective import Loss, Objective, make_objective
from lightning_caq.progress import Progress
from lightning_caq.seeding import generator

OF_BLOCKS = frozenset({"kappa", "kappa_mean", "lipschitz", "local_lipschitz"})
OF_ROUNDING = frozenset({"rounding_error", "output_error", "amplification", "diagonal"})
OF_HESSIAN = frozenset({"trace", "subspace", "loss_change"})
MEASURES = OF_BLOCKS | OF_ROUNDING | OF_HESSIAN | {"inputs", "gradient_norm", "top_eigenvalue"}
BLOCK_SAMPLES = 8
# A prediction of the loss change that is off by more than half, and by more than noise, is outside the model's range.
VALIDITY_TOLERANCE = 0.5
VALIDITY_FLOOR = 1e-3

Deltas = Mapping[str, Mapping[int, Tensor]]
Rows = dict[str, dict[str, Any]]


def measure(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    objective: str = "distill",
    loss_fn: Loss | None = None,
    needs: frozenset[str] = frozenset({"kappa", "lipschitz"}),
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    samples: int = 256,
    eigenpairs: int = 64,
    seed: int = 0,
    known: CurvatureProfile | None = None,
    progress: Progress | None = None,
) -> CurvatureProfile:
    """Measure a float network.

    The network is measured in eval mode and is left as it was: weights, statistics, gradients, flags, random states.

    Args:
        model: The float network.
        layers: The layers, from ``find_layers``.
        batches: Calibration batches on the model's device.
        objective: ``"distill"`` or ``"task"``.
        loss_fn: Loss of a model and a batch, for ``"task"``.
        needs: Which measures to take, of ``MEASURES``.
        bits: Bit-widths whose rounding errors are wanted.
        samples: Samples to measure on, the first of ``batches``.
        eigenpairs: Eigenpairs that span the short-axis subspace.
        seed: Seed of the random probes.
        known: A profile of an earlier call; it is returned if it holds what is needed, for the same weights, samples
            and settings.
        progress: Where to say what is being done.

    Returns:
        One row a layer.

    Raises:
        OptionError: If a measure is not known, or the objective lacks its loss.
        CalibrationError: If outputs or losses are not finite.
    """
    unknown = needs - MEASURES
    if unknown:
        raise OptionError(f"needs={sorted(unknown)} are not known measures; choose from {sorted(MEASURES)}.")
    progress = progress or Progress()
    start = time.perf_counter()
    rows: Rows = {x.name: {"weights": x.weights, "channels": x.channels, "macs": x.macs} for x in layers}
    chosen = take_samples(batches, samples)
    whole: dict[str, Any] = {}
    with curvature_safe(model), preserved(model), InFloat32(model) as float32, _differentiable(model, layers):
        chosen = float32.batches(chosen)
        target = make_objective(objective, model, chosen, loss_fn)
        mark = _fingerprint(model, layers, target, f"{tuple(bits)}/{eigenpairs}/{seed}")
        if known is not None and known.fingerprint == mark and needs <= set(known.needs):
            progress.say("measured before: the profile of the same weights and samples is used")
            return known
        if needs & OF_BLOCKS:
            with progress.step("curvature and Lipschitz constants"):
                _blocks(model, layers, chosen, needs, seed, rows)
        if needs & {"inputs"}:
            for layer in layers:
                statistics = input_statistics(model, layer, chosen)
                rows[layer.name].update(input_norm=statistics.norm, diameter=statistics.diameter)
        if needs & {"gradient_norm", "top_eigenvalue"}:
            with progress.step("gradients and top eigenvalues"):
                _slopes(model, layers, target, needs, seed, rows)
        if needs & (OF_ROUNDING | OF_HESSIAN):
            with progress.step("rounding errors"):
                deltas = {layer.name: nearest_errors(model, layer, bits) for layer in layers}
                _rounding(model, layers, target, deltas, needs, rows)
            if needs & OF_HESSIAN:
                with progress.step("eigenspace of the Hessian"):
                    spectrum = _gram if objective == "distill" else _lanczos
                    whole = spectrum(model, layers, target, deltas, eigenpairs, seed, rows)
            if "loss_change" in needs:
                with progress.step("validity of the quadratic model"):
                    _validity(model, layers, target, deltas, whole["residual_curvature"], rows)
    return CurvatureProfile(
        layers=tuple(LayerCurvature(name=name, **row) for name, row in rows.items()),
        objective=objective,
        samples=target.samples,
        seed=seed,
        seconds=time.perf_counter() - start,
        needs=tuple(sorted(needs)),
        fingerprint=mark,
        **whole,
    )


def _fingerprint(model: nn.Module, layers: Sequence[Layer], target: Objective, settings: str) -> str:
    """Of everything that the figures depend on; of a loss function only its value is known."""
    with torch.no_grad():
        loss = target.batch_loss(model, 0)
    tensors = {f"state/{name}": x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    tensors |= {f"batch/{i}": x for i, x in enumerate(tree_leaves(target.batches)) if isinstance(x, Tensor)}
    names = ",".join(layer.name for layer in layers)
    return fingerprint({**tensors, f"{target.name}/{settings}/{names}": loss})


@contextmanager
def _differentiable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Let autograd see the layers' weights, frozen ones too, and nothing else."""
    flags = {p: p.requires_grad for p in model.parameters()}
    wanted = {id(layer_weight(model, layer)) for layer in layers}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _blocks(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], needs: frozenset[str], seed: int, rows: Rows
) -> None:
    blocks = record_blocks(model, layers, take_samples(batches, BLOCK_SAMPLES)[0])
    for layer in layers:
        block, row = blocks.get(layer.name), rows[layer.name]
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


def _slopes(
    model: nn.Module, layers: Sequence[Layer], target: Objective, needs: frozenset[str], seed: int, rows: Rows
) -> None:
    if "gradient_norm" in needs:
        for name, norm in gradient_norms(model, layers, target).items():
            rows[name]["gradient_norm"] = norm
    if "top_eigenvalue" in needs:
        for name, (value, residual) in top_eigenvalues(model, layers, target, seed=seed).items():
            rows[name].update(top_eigenvalue=value, top_eigenvalue_residual=residual)


def _rounding(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    deltas: Deltas,
    needs: frozenset[str],
    rows: Rows,
) -> None:
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


def _gram(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, k: int, seed: int, rows: Rows
) -> dict[str, Any]:
    spectrum = gram_spectrum(model, layers, target.batches, deltas, k=k)
    for name, row in rows.items():
        row.update(trace=spectrum.traces[name], trace_stderr=0.0, subspace_curvature=spectrum.energies[name])
        row["subspace_energy"] = {b: float(p[:k].square().sum()) for b, p in spectrum.projected[name].items()}
    trace, n = sum(spectrum.traces.values()), sum(layer.weights for layer in layers)
    return {**_spectrum_fields(spectrum.values[:k], trace, n), "kept": spectrum.kept}


def _lanczos(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, k: int, seed: int, rows: Rows
) -> dict[str, Any]:
    with batchnorm_folded(model, layers, target.batches[0]):
        operator = Hessian(model, layers, target)
        start = operator.like(torch.randn(operator.size, generator=generator(seed, "lanczos")))
        pairs = lanczos(operator.product, start, min(k, operator.size))
        traces = estimate_layer_traces(operator, [generator(seed, f"trace/{x.name}") for x in layers])
    magnitude = pairs.values.abs()
    for i, (layer, part) in enumerate(zip(layers, pairs.vectors.split(operator.sizes), strict=True)):
        row = rows[layer.name]
        row.update(trace=float(traces.values[i]), trace_stderr=float(traces.errors[i]))
        row["subspace_curvature"] = float((magnitude * part.double().square().sum(0).cpu()).sum())
        row["subspace_energy"] = {
            b: float((magnitude * (part.T @ d.flatten()).double().square().cpu()).sum())
            for b, d in deltas[layer.name].items()
        }
    return _spectrum_fields(pairs.values, float(traces.values.sum()), operator.size)


def _spectrum_fields(values: Tensor, trace: float, n: int) -> dict[str, Any]:
    outside = max(trace - float(values.sum()), 0.0) / max(n - len(values), 1)
    return {"eigenvalues": tuple(values.tolist()), "trace": trace, "residual_curvature": outside}


def _validity(
    model: nn.Module, layers: Sequence[Layer], target: Objective, deltas: Deltas, mu: float, rows: Rows
) -> None:
    """Walk up the bit-widths of each layer until the quadratic model holds (CET Eq. 7); below, measured changes count.

    The error shrinks with every bit, so the model that holds at one bit-width holds at the larger ones.
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
            predicted = row["first_order"][b] + 0.5 * (row["subspace_energy"][b] + mu * row["rounding_error"][b])
            if abs(actual - predicted) <= max(VALIDITY_TOLERANCE * abs(actual), VALIDITY_FLOOR):
                break
            outside.append(b)
        row["outside"] = tuple(outside)


def _gradient(model: nn.Module, layers: Sequence[Layer], target: Objective) -> dict[str, Tensor]:
    gradient = Hessian(model, layers, target).gradient()
    return {layer.name: part for layer, part in zip(layers, gradient, strict=True)}
