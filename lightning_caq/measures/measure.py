"""measure(): everything that was asked for, of every layer, as one profile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_caq.errors import OptionError
from lightning_caq.measures import steps
from lightning_caq.measures.cost import estimate_seconds
from lightning_caq.measures.rounding.channel_groups import finish_groups
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.batches import calibration_batches, take_samples
from lightning_caq.network.layers import Layer, find_layers, layer_weight
from lightning_caq.network.objective import Loss, Objective, make_objective
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.utilities.contexts import InFloat32, curvature_safe
from lightning_caq.utilities.fingerprint import fingerprint
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.progress import Progress, duration
from lightning_caq.utilities.sharing import ALONE, Sharing

OF_BLOCKS = frozenset({"kappa", "kappa_mean", "lipschitz", "local_lipschitz"})
OF_ROUNDING = frozenset(
    {"rounding_error", "output_error", "amplification", "diagonal", "kl", "distribution_distance", "scale_importance"}
)
OF_HESSIAN = frozenset({"trace", "subspace", "density", "loss_change", "channel_groups"})
OF_NETWORK = frozenset({"inputs", "activation_cost", "gradient_norm", "top_eigenvalue", "lipschitz_amplification"})
MEASURES = OF_BLOCKS | OF_ROUNDING | OF_HESSIAN | OF_NETWORK


def measure(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    layers: Sequence[Layer] | None = None,
    objective: str = "distill",
    loss_fn: Loss | None = None,
    needs: frozenset[str] = frozenset({"kappa", "lipschitz"}),
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    samples: int = 256,
    eigenpairs: int = 64,
    seed: int = 0,
    known: CurvatureProfile | None = None,
    time_budget: float | None = None,
    progress: Progress | None = None,
    sharing: Sharing = ALONE,
) -> CurvatureProfile:
    """Measure a float network.

    The network is measured in eval mode and is left as it was: weights, statistics, gradients, flags, random states.
    Several processes with the same network and the same batches may divide the work; all get the same profile, and
    what fails on one of them is raised on all.

    Args:
        model: The float network.
        batches: Calibration batches.
        layers: The layers, from ``find_layers``; by default all that can be quantized.
        objective: ``"distill"`` or ``"task"``.
        loss_fn: Loss of a model and a batch, for ``"task"``.
        needs: Which measures to take, of ``MEASURES``.
        bits: Bit-widths whose rounding errors are wanted.
        samples: Samples to measure on, the first of ``batches``.
        eigenpairs: Eigenpairs that span the short-axis subspace.
        seed: Seed of the random probes.
        known: A profile of an earlier call; it is returned if it holds what is needed, for the same weights, samples
            and settings.
        time_budget: Seconds that measuring may take, as far as the estimate goes: fewer samples are then measured on.
        progress: Where to say what is being done.
        sharing: Who divides the work.

    Returns:
        One row a layer.

    Example:
        >>> profile = measure(nn.Linear(4, 2), [torch.randn(16, 4)], needs=frozenset({"kappa", "lipschitz"}))
        >>> row = profile.layers[0]
        >>> abs(row.kappa - 2 * row.lipschitz**2) < 1e-2 * row.kappa  # κ = 2 σ_max² of a linear layer
        True

    Raises:
        OptionError: If a measure is not known, the objective lacks its loss, or the time budget is not positive.
        CalibrationError: If outputs or losses are not finite, or another process failed.
    """
    unknown = needs - MEASURES
    if unknown:
        raise OptionError(f"needs={sorted(unknown)} are not known measures; choose from {sorted(MEASURES)}.")
    if time_budget is not None and not time_budget > 0:
        raise OptionError(f"time_budget={time_budget!r} is not allowed; give a number of seconds above 0.")
    progress = progress or Progress()
    start = time.perf_counter()
    with sharing.agreed("measuring"), curvature_safe(model), preserved(model), InFloat32(model) as float32:
        device = next((p.device for p in model.parameters()), None)
        chosen = float32.batches(calibration_batches(batches, samples, device))
        layers = find_layers(model, chosen[0]) if layers is None else layers
        with differentiable(model, layers):
            target = make_objective(objective, model, chosen, loss_fn)
            seconds = estimate_seconds(model, layers, target, needs, bits=len(bits), eigenpairs=eigenpairs)
            seconds = sharing.first(seconds / sharing.size, "estimate of the time")
            progress.say(f"measuring on {target.samples} samples: about {duration(seconds)}")
            if time_budget is not None and seconds > time_budget:
                chosen = take_samples(chosen, max(int(target.samples * time_budget / seconds), 1))
                target = make_objective(objective, model, chosen, loss_fn)
                progress.say(f"measuring on {target.samples} samples only, to stay within {duration(time_budget)}")
            mark = _fingerprint(model, layers, target, f"{tuple(bits)}/{eigenpairs}/{seed}")
            holds = known is not None and known.fingerprint == mark and needs <= set(known.needs)
            found = sharing.first(known if holds else None, "profile of an earlier run")
            if found is not None:
                progress.say("measured before: the profile of the same weights and samples is used")
                return found
            rows, whole = _take(model, layers, target, needs, bits, eigenpairs, seed, progress, sharing)
        profile = CurvatureProfile(
            layers=tuple(LayerCurvature(name=name, **row) for name, row in rows.items()),
            objective=objective,
            samples=target.samples,
            seed=seed,
            seconds=time.perf_counter() - start,
            needs=tuple(sorted(needs)),
            fingerprint=mark,
            **whole,
        )
        return sharing.first(profile, "profile")


def _take(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    needs: frozenset[str],
    bits: Sequence[int],
    eigenpairs: int,
    seed: int,
    progress: Progress,
    sharing: Sharing,
) -> tuple[steps.Rows, dict[str, Any]]:
    """Take the measures step by step; returns the rows and what holds for the whole network."""
    rows: steps.Rows = {x.name: {"weights": x.weights, "channels": x.channels, "macs": x.macs} for x in layers}
    whole: dict[str, Any] = {}
    mine = sharing.mine(layers)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        with progress.step(name), sharing.agreed(name):
            yield

    if needs & OF_BLOCKS:
        with step("curvature and Lipschitz constants"):
            steps.blocks(model, mine, target.batches, needs, seed, rows)
    if needs & {"inputs"}:
        steps.inputs(model, mine, target.batches, rows)
    if "activation_cost" in needs:
        with step("costs of rounded inputs"):
            steps.rounded_inputs(model, mine, target, [b for b in bits if b >= 2], rows)
    if "lipschitz_amplification" in needs:
        with step("Lipschitz constants along the graph"):
            whole |= steps.graph(model, layers, target.batches, seed, rows)
    if needs & {"gradient_norm", "top_eigenvalue"}:
        with step("gradients and top eigenvalues"):
            steps.slopes(model, mine, target, needs, seed, rows)
    if needs & (OF_ROUNDING | OF_HESSIAN):
        with step("rounding errors"):
            deltas = {layer.name: nearest_errors(model, layer, bits) for layer in mine}
            steps.rounding(model, layers, target, deltas, needs, seed, rows)
        if needs & OF_HESSIAN:
            with step("eigenspace of the Hessian"):
                spectrum = steps.gram if target.name == "distill" else steps.task_hessian
                whole |= spectrum(model, layers, target, deltas, eigenpairs, seed, rows, sharing)
        if "density" in needs and "density" not in whole:
            with step("spectral density"):
                whole |= steps.density(model, layers, target, seed, sharing)
        if "loss_change" in needs:
            with step("validity of the quadratic model"):
                steps.validity(model, layers, target, deltas, rows, sharing)
    if "channel_groups" in needs:
        for layer in mine:
            rows[layer.name]["groups"] = finish_groups(layer, rows[layer.name])
    own = sharing.gather({layer.name: rows[layer.name] for layer in mine}, "rows")
    return {layer.name: own[layer.name] for layer in layers}, whole


def _fingerprint(model: nn.Module, layers: Sequence[Layer], target: Objective, settings: str) -> str:
    """Of everything that the figures depend on; of a loss function only its value is known."""
    with torch.no_grad():
        loss = target.batch_loss(model, 0)
    tensors = {f"state/{name}": x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    tensors |= {f"batch/{i}": x for i, x in enumerate(tree_leaves(target.batches)) if isinstance(x, Tensor)}
    names = ",".join(layer.name for layer in layers)
    return fingerprint({**tensors, f"{target.name}/{settings}/{names}": loss})


@contextmanager
def differentiable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
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
