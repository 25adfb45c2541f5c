"""Loss sample: a few samples on which changes of the loss are measured, where all of them would cost too much.

One forward pass a layer over all samples makes a cost that grows with the square of the depth. Here the passes of all
layers together cost a few gradients, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.measurement import Measurement
from lightning_caq.network.batches import batch_size, pick
from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.network.outputs import divergences
from lightning_caq.network.perturbed import perturbed
from lightning_caq.utilities.seeding import generator

_GRADIENTS = 3.0  # that all layers together may cost
_PASSES = 2.5 / 3  # of a layer, in gradients: at two or three bit-widths, a forward pass being a third
_LEAST = 8


def affordable_samples(layers: int, samples: int) -> int:
    """So many samples that all layers together cost three gradients, at least eight.

    Example:
        >>> affordable_samples(20, 256), affordable_samples(50, 128), affordable_samples(400, 128)
        (46, 9, 8)
    """
    return min(max(int(_GRADIENTS * samples / (_PASSES * max(layers, 1))), _LEAST), samples)


def changes_cost(extent: Extent, changes: int) -> Cost:
    """What so many layers, or groups of channels, cost whose changes of the loss are measured.

    Example:
        >>> extent = Extent("distill", layers=20, bits=6, eigenpairs=10, samples=256, first=128)
        >>> changes_cost(extent, 20).gradients
        2.99...
    """
    return Cost(_PASSES * changes * affordable_samples(extent.layers, extent.samples) / extent.samples)


@dataclass(frozen=True)
class LossSample:
    """Samples, drawn with replacement, and what each counts.

    Attributes:
        objective: The objective on the samples that were drawn, each once.
        weights: For each batch what its samples count in the mean over all samples.
        reference: The objective at the float weights, on these samples.
    """

    objective: Objective
    weights: tuple[Tensor, ...]
    reference: float

    def change(self, model: nn.Module, layer: Layer, delta: Tensor) -> float:
        """ℓ(w + Δ_i) − ℓ(w), in nat, right in the mean over draws; the weight is put back."""
        with perturbed(model, [layer], {layer.name: delta}):
            return self._value(model) - self.reference

    def _value(self, model: nn.Module) -> float:
        if self.objective.name != "distill":
            return self.objective.value(model)
        with torch.no_grad():
            runs = zip(self.objective.targets, self.objective.batches, self.weights, strict=True)
            parts = [
                float((divergences(target, run_model(model, batch)).double().cpu() * weights).sum())
                for target, batch, weights in runs
            ]
        return sum(parts)


def draw_loss_sample(measurement: Measurement, energies: Tensor | None) -> LossSample:
    """Draw samples with the probability π = ½ share of the energies + ½ / N; each counts 1 / (draws N π).

    A sample that errors act on is likely to be drawn, so that one of the few does not outweigh the rest; the other half
    keeps the weights below 2 (importance sampling with a defensive mixture: Hesterberg 1995). The mean of a loss of the
    user's own can only be taken over samples that count alike: these are drawn evenly.

    Args:
        measurement: What is measured.
        energies: What each sample is likely to add, shape (N,), such as ``Spectrum.sample_energies``.

    Returns:
        The samples; all of them, where so many are affordable.
    """
    m, samples = measurement, measurement.objective.samples
    count = affordable_samples(len(m.layers), samples)
    probability = torch.full((samples,), 1 / samples, dtype=torch.float64)
    if energies is not None and m.objective.name == "distill" and float(energies.sum()) > 0:
        probability = 0.5 * probability + 0.5 * energies.double() / energies.sum()
    if count == samples:
        drawn, times = torch.arange(samples), torch.ones(samples, dtype=torch.long)
        probability = torch.full_like(probability, 1 / samples)
    else:
        start = torch.rand((), generator=generator(m.seed, "loss sample"), dtype=torch.float64)
        points = (torch.arange(count) + start) / count
        places = torch.searchsorted(probability.cumsum(0), points).clamp_max(samples - 1)
        drawn, times = places.unique(return_counts=True)
    weights = times / (count * samples * probability[drawn])
    batches, weights_of = _gather(m.batches, drawn, weights)
    objective = m.objective.on(m.model, batches)
    sample = LossSample(objective, weights_of, 0.0)
    return LossSample(objective, weights_of, sample._value(m.model))


def _gather(batches: Sequence[Any], drawn: Tensor, weights: Tensor) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The batches cut to the samples that were drawn, and what these count."""
    cut, weights_of, first = [], [], 0
    for batch in batches:
        size = batch_size(batch)
        here = (drawn >= first) & (drawn < first + size)
        if bool(here.any()):
            cut.append(batch if bool(here.sum() == size) else pick(batch, (drawn[here] - first).tolist()))
            weights_of.append(weights[here])
        first += size
    return cut, tuple(weights_of)
