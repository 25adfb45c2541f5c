"""measure(): everything that was asked for, of every layer, as one profile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import OptionError
from lightning_caq.measures.cost import Extent, estimate_seconds
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure, required_measures, total_cost
from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.layers import Layer, chosen_layers, find_layers, layer_weight
from lightning_caq.network.meaning import Output
from lightning_caq.network.objective import Loss, make_objective
from lightning_caq.network.parts.expand import every_weight_a_layer, expand_uses
from lightning_caq.network.prepare import ForwardFunction, ModelUse, prepare
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.grids.values import AFFINE, Quantizer
from lightning_caq.utilities.contexts import InFloat32, curvature_safe
from lightning_caq.utilities.fingerprint import fingerprint
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.progress import Progress, duration
from lightning_caq.utilities.sharing import ALONE, Sharing
from lightning_caq.utilities.structures import tensors as structure_tensors


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
    quantizer: Quantizer = AFFINE,
    forward_fn: ForwardFunction | str | None = None,
    output: Output = "auto",
    class_axis: int | None = None,
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
        needs: Which measures to take, of ``registry.available_measures()``.
        bits: Bit-widths whose rounding errors are wanted.
        samples: Samples to measure on, the first of ``batches``.
        eigenpairs: Eigenpairs that span the short-axis subspace.
        seed: Seed of the random probes.
        known: A profile of an earlier call; it is returned if it holds what is needed, for the same weights, samples
            and settings.
        time_budget: Seconds that measuring may take, as far as the estimate goes: fewer samples are then measured on.
        progress: Where to say what is being done.
        sharing: Who divides the work.
        quantizer: The values that weights would be rounded to.
        forward_fn: How the module is run, a function of it and a batch; found by itself as a rule.
        output: What outputs mean: ``"auto"``, ``"classes"``, ``"values"``, or a function that selects among them.
        class_axis: The axis of classes; found by itself as a rule.

    Returns:
        One row a layer.

    Example:
        >>> profile = measure(nn.Linear(4, 2), [torch.randn(16, 4)], needs=frozenset({"kappa", "lipschitz"}))
        >>> row = profile.layers[0]
        >>> abs(row.kappa - 2 * row.lipschitz**2) < 0.1 * row.kappa  # κ = 2 σ_max² of a linear layer
        True

    Raises:
        OptionError: If a measure is not known, the objective lacks its loss, or the time budget is not positive.
        CalibrationError: If outputs or losses are not finite, or another process failed.
    """
    measures = required_measures(needs)
    if time_budget is not None and not time_budget > 0:
        raise OptionError(f"time_budget={time_budget!r} is not allowed; give a number of seconds above 0.")
    progress = progress or Progress()
    start = time.perf_counter()
    with (
        sharing.agreed("measuring"),
        every_weight_a_layer(model),
        curvature_safe(model),
        preserved(model),
        InFloat32(model) as float32,
    ):
        if layers is None:
            chosen_layers(model)  # refuses what has none, and weights that are not finite
        device = next((p.device for p in model.parameters()), None)
        chosen: list[Any] = prepare(
            model,
            batches,
            samples,
            use=ModelUse(forward_fn, output, class_axis),
            loss=loss_fn,
            task=objective == "task",
            device=device,
            convert=float32.batch,
        )
        if layers is None:
            expand_uses(model, chosen[0])
            layers = find_layers(model, *chosen)
        with differentiable(model, layers):
            measurement = Measurement(
                model=model,
                layers=layers,
                objective=make_objective(objective, model, chosen, loss_fn),
                needs=needs.union(*(measure.names for measure in measures)),
                bits=bits,
                eigenpairs=eigenpairs,
                seed=seed,
                quantizer=quantizer,
                sharing=sharing,
            )
            seconds = sharing.first(_seconds(measurement, measures) / sharing.size, "estimate of the time")
            count = measurement.objective.samples
            if time_budget is not None and seconds > time_budget:
                chosen = take_samples(chosen, max(int(count * time_budget / seconds), 1))
                measurement = replace(measurement, objective=make_objective(objective, model, chosen, loss_fn))
                seconds, count = time_budget, measurement.objective.samples
            mark = _fingerprint(measurement)
            usable = known is not None and known.fingerprint == mark and needs <= set(known.needs)
            earlier = sharing.first(known if usable else None, "profile of an earlier run")
            if earlier is not None:
                progress.announce("measured before, the profile of the same weights and samples is used")
                return earlier
            within = f" only, to stay within {duration(seconds)}" if seconds == time_budget else ""
            progress.expect("curvature", seconds, steps=tuple(dict.fromkeys(x.step for x in measures)))
            progress.announce(f"measuring on {count} samples{within}")
            profile = _take(measurement, measures, progress)
        profile = replace(profile, seconds=time.perf_counter() - start, needs=tuple(sorted(needs)), fingerprint=mark)
        return sharing.first(profile, "profile")


def _seconds(measurement: Measurement, measures: Sequence[Measure]) -> float:
    """About how long the measures take one process."""
    m = measurement
    extent = Extent(
        objective=m.objective.name,
        layers=len(m.layers),
        bits=len(m.bits),
        eigenpairs=m.eigenpairs,
        samples=m.objective.samples,
        first=batch_size(m.batches[0]),
        needs=m.needs,
        weights=sum(layer.weights for layer in m.layers),
    )
    return estimate_seconds(m.model, m.layers, m.objective, total_cost(measures, extent))


def _take(measurement: Measurement, measures: Sequence[Measure], progress: Progress) -> CurvatureProfile:
    """Take the measures step by step, each process for its own layers; all get the rows of all."""
    m, sharing = measurement, measurement.sharing
    profile = CurvatureProfile(
        layers=tuple(LayerCurvature(x.name, x.weights, x.channels, x.macs) for x in m.rank_layers),
        objective=m.objective.name,
        samples=m.objective.samples,
        seed=m.seed,
        quantizer=m.quantizer.name,
        range=m.quantizer.range,
        symmetry=m.quantizer.symmetry,
        group_size=m.quantizer.group_size,
        scale_dtype=m.quantizer.scale_dtype,
    )
    for step, together in groupby(measures, key=attrgetter("step")):
        with progress.step(step), sharing.agreed(step):
            for measure in together:
                if profile.layers or measure.collective:
                    profile = measure.take(m, profile)
    rows = sharing.gather({row.name: row for row in profile.layers}, "rows")
    return replace(profile, layers=tuple(rows[layer.name] for layer in m.layers))


def _fingerprint(measurement: Measurement) -> str:
    """Of everything that the figures depend on; of a loss function only its value is known."""
    m = measurement
    with torch.no_grad():
        loss = m.objective.batch_loss(m.model, 0)
    tensors = {f"state/{name}": x for name, x in m.model.state_dict().items() if isinstance(x, Tensor)}
    tensors |= {f"batch/{i}": x for i, x in enumerate(structure_tensors(list(m.batches)))}
    names = ",".join(layer.name for layer in m.layers)
    settings = f"{tuple(m.bits)}/{m.eigenpairs}/{m.seed}"
    if m.quantizer != AFFINE:
        settings += f"/{m.quantizer}"
    return fingerprint({**tensors, f"{m.objective.name}/{settings}/{names}": loss})


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
