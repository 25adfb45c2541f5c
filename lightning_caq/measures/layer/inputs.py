"""Inputs: size and spread of what reaches each layer (CAQ 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layer_calls import visit_layers
from lightning_caq.network.layers import Layer
from lightning_caq.profile import CurvatureProfile


@dataclass(frozen=True)
class InputStatistics:
    """Size and spread of a layer's inputs over samples.

    Attributes:
        norm: Root mean square of ‖z‖.
        diameter: Twice the largest ‖z − mean z‖.
    """

    norm: float
    diameter: float


def input_statistics(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> dict[str, InputStatistics]:
    """Size and spread of the inputs of every layer, by its name; one pass for all layers.

    An embedding's words are one-hot vectors, of norm 1 each. What no batch reaches has inputs of size 0.

    Example:
        >>> net, x = nn.Linear(2, 1), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
        >>> input_statistics(net, [Layer("", "linear", (1, 2), modules=("",))], [x])
        {'': InputStatistics(norm=5.0, diameter=10.0)}
    """
    norms: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    diameters: dict[str, float] = {}

    def visit(layer: Layer, module: nn.Module, inputs: Tensor) -> None:
        z = inputs.float().flatten(1)
        norms[layer.name].append(z.norm(dim=1).double())
        # The spread is taken over the first batch: the mean must be known before the distances are.
        if layer.name not in diameters:
            diameters[layer.name] = float(2 * (z - z.mean(0)).norm(dim=1).max())

    visit_layers(model, [layer for layer in layers if layer.kind != "embedding"], batches, visit)
    statistics = {x.name: InputStatistics(*((1.0, 2.0**0.5) if x.kind == "embedding" else (0.0, 0.0))) for x in layers}
    for name, diameter in diameters.items():
        statistics[name] = InputStatistics(float(torch.cat(norms[name]).square().mean().sqrt()), diameter)
    return statistics


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Norm and diameter of every layer's inputs."""
    statistics = input_statistics(measurement.model, measurement.rank_layers, measurement.batches)
    return profile.with_rows(
        lambda row: replace(row, input_norm=statistics[row.name].norm, diameter=statistics[row.name].diameter)
    )


MEASURE = Measure(
    "inputs",
    step="curvature and Lipschitz constants",
    take=take,
    cost=lambda extent: Cost(0.5),
)
