"""Scale importance: quantizer scales, learned for every layer and bit-width at once (LIMPQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective, make_objective
from lightning_caq.network.perturbed import replaced_weights
from lightning_caq.profile import CurvatureProfile
from lightning_caq.utilities.seeding import generator

_STEPS = 40
_SAMPLES = 32
_RATE = 0.05


def scale_importance(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    bits: Sequence[int],
    *,
    seed: int = 0,
    steps: int = _STEPS,
    samples: int = _SAMPLES,
) -> dict[str, dict[int, float]]:
    """Scales s_i(b) of a learned-step-size quantizer (LSQ), one a layer and bit-width, in the unit of the weights.

    A layer that must keep its large weights exact ends with a larger scale, which LIMPQ reads as importance (Tang et
    al. 2022). As there, all scales are learned together: each step adds up the gradients of the network with every
    layer at b bits, for each b, and of one with random bits. The loss is the divergence from the float outputs. Unlike
    there the weights are fixed and training is short (Adam on log s), so scales stay near their start, 2 mean|W| / √Q_P
    (Esser et al. 2020): within a factor e² under the defaults.

    Args:
        model: The float network, in eval mode; its weights, which must require gradients, are put back.
        layers: The layers.
        batches: The samples.
        bits: The bit-widths.
        seed: Seed of the random bits.
        steps: Steps of training; each costs (number of bit-widths + 1) gradients.
        samples: Samples a step; steps take turns through the batches.

    Returns:
        Layer name to bits to scale.

    Example:
        >>> net, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> _ = net.weight.data.fill_(-0.5)
        >>> layers = [Layer("", "linear", (1, 1), calls=1, modules=("",))]
        >>> abs(scale_importance(net, layers, [x], [2], steps=200)[""][2] - 0.25) < 0.05  # −2 · ¼ is exact
        True
    """
    floats = [layer_weight(model, layer).detach().clone() for layer in layers]
    starts = [[_start(weight, b) for b in bits] for weight in floats]
    logs = torch.tensor(starts, dtype=torch.float64).log()
    optimizer = torch.optim.Adam([logs], lr=_RATE)
    parts = _parts(model, batches, samples)
    draw = generator(seed, "scale_importance")
    uniform = [[column] * len(layers) for column in range(len(bits))]
    for step in range(steps):
        mixed = torch.randint(len(bits), (len(layers),), generator=draw).tolist()
        logs.grad = torch.zeros_like(logs)
        for choice in (*uniform, mixed):
            scales = [float(logs[i, column].exp()) for i, column in enumerate(choice)]
            quantized = [
                learned_step(weight, scale, bits[column])
                for weight, scale, column in zip(floats, scales, choice, strict=True)
            ]
            slopes = _scale_gradients(model, layers, quantized, parts[step % len(parts)])
            for i, column in enumerate(choice):
                logs.grad[i, column] += scales[i] * slopes[i]  # by log s
        optimizer.step()
    return {layer.name: {b: float(logs[i, c].exp()) for c, b in enumerate(bits)} for i, layer in enumerate(layers)}


def learned_step(weight: Tensor, scale: float, bits: int) -> tuple[Tensor, Tensor]:
    """The quantizer of LSQ and its derivative by the scale (Esser et al. 2020, eq. 1 to 3).

        Ŵ = s round(clip(W / s, −Q_N, Q_P)),   ∂Ŵ/∂s = round(W / s) − W / s inside the range, −Q_N or Q_P outside

    Args:
        weight: W.
        scale: s, positive.
        bits: b; Q_N = 2^(b−1), Q_P = 2^(b−1) − 1.

    Returns:
        Ŵ and ∂Ŵ/∂s, in the shape of the weight.

    Example:
        >>> learned_step(torch.tensor([0.3, 5.0, -5.0]), 0.5, 2)
        (tensor([ 0.5000,  0.5000, -1.0000]), tensor([ 0.4000,  1.0000, -2.0000]))
    """
    codes = weight / scale
    clipped = codes.clamp(-(1 << bits - 1), _largest_code(bits))
    rounded = clipped.round()
    return scale * rounded, torch.where(clipped == codes, rounded - codes, rounded)


def _largest_code(bits: int) -> int:
    return max((1 << bits - 1) - 1, 1)  # at 1 bit LSQ would have no positive value


def _start(weight: Tensor, bits: int) -> float:
    mean = float(weight.double().abs().mean())
    return 2 * mean / _largest_code(bits) ** 0.5 or 1.0  # a layer of zeros has no scale of its own


def _parts(model: nn.Module, batches: Sequence[Any], samples: int) -> list[Objective]:
    total = sum(map(batch_size, batches))
    return [
        make_objective("distill", model, take_samples(batches, samples, skip=first))
        for first in range(0, total, samples)
    ]


def _scale_gradients(
    model: nn.Module, layers: Sequence[Layer], quantized: Sequence[tuple[Tensor, Tensor]], objective: Objective
) -> list[float]:
    """∂ℓ/∂s of every layer, with all layers quantized: the gradient by the rounded weight times its derivative by s."""
    weights = [layer_weight(model, layer) for layer in layers]
    rounded = {layer.name: values for layer, (values, _) in zip(layers, quantized, strict=True)}
    with replaced_weights(model, layers, rounded):
        losses = [objective.weight(i) * objective.batch_loss(model, i) for i in range(len(objective.batches))]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True, materialize_grads=True)
    return [float((g * slope).double().sum()) for g, (_, slope) in zip(gradients, quantized, strict=True)]


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The scales of every layer; they are learned together, so every process learns all."""
    m = measurement
    scales = scale_importance(m.model, m.layers, m.batches, sorted(m.bits), seed=m.seed)
    return profile.with_rows(lambda row: replace(row, scale_importance=scales[row.name]))


MEASURE = Measure(
    "scale_importance",
    step="rounding errors",
    take=take,
    cost=lambda extent: Cost(_STEPS * _SAMPLES * (extent.bits + 1) / extent.samples),
    needs=frozenset({"rounding_error"}),
)
