"""Rounding errors: what nearest rounding does to a weight, to its layer's output and to the network's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.batches import batch_size
from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, apply_weight, layer_modules, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.sizes import W


def nearest_errors(model: nn.Module, layer: Layer, bits: Sequence[W]) -> dict[W, Tensor]:
    """Δ_i(b) = Q_b(W_i) − W_i for every bit-width, in the shape of the weight.

    Costs are built from nearest rounding even where error feedback rounds later: feedback makes the error of a single
    layer small, and a sum of such errors understates what many layers at few bits do together.

    Example:
        >>> net = nn.Linear(4, 4)
        >>> errors = nearest_errors(net, Layer("", "linear", (4, 4)), [2, 8])
        >>> bool(errors[2].norm() > errors[8].norm())
        True
    """
    weight = layer_weight(model, layer).detach()
    return {b: (fit_grid(weight, b, layer.channel_shape).nearest(weight) - weight).to(weight.dtype) for b in bits}


@dataclass
class InputStatistics:
    """Size and spread of a layer's inputs over samples.

    Attributes:
        norm: Root mean square of ‖z‖.
        diameter: Twice the largest ‖z − mean z‖.
    """

    norm: float
    diameter: float


def output_errors(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], deltas: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[int, float]]:
    """e_i(b): root mean square over samples of ‖Δ_i(b) z_i‖, in the unit of the layer's output.

    One pass serves all layers.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Name of each of the layers to bits to Δ_i(b).

    Returns:
        Layer name to bits to e_i(b); zeros for a layer that no batch reaches.

    Example:
        >>> net, x = nn.Linear(2, 1), torch.ones(5, 2)
        >>> delta = torch.tensor([[0.5, 0.25]])
        >>> output_errors(net, [Layer("", "linear", (1, 2), modules=("",))], [x], {"": {3: delta}})
        {'': {3: 0.75}}
    """
    sums = {layer.name: dict.fromkeys(deltas[layer.name], 0.0) for layer in layers}

    def visit(layer: Layer, module: nn.Module, inputs: Tensor) -> None:
        for b, delta in deltas[layer.name].items():
            sums[layer.name][b] += float(apply_weight(module, delta, inputs).double().square().sum())

    _visit_layers(model, layers, batches, visit)
    samples = sum(map(batch_size, batches))
    return {name: {b: (total / samples) ** 0.5 for b, total in found.items()} for name, found in sums.items()}


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

    _visit_layers(model, [layer for layer in layers if layer.kind != "embedding"], batches, visit)
    found = {x.name: InputStatistics(*((1.0, 2.0**0.5) if x.kind == "embedding" else (0.0, 0.0))) for x in layers}
    for name, diameter in diameters.items():
        found[name] = InputStatistics(float(torch.cat(norms[name]).square().mean().sqrt()), diameter)
    return found


def loss_change(model: nn.Module, layer: Layer, objective: Objective, delta: Tensor, reference: float) -> float:
    """ℓ(w + Δ_i) − ℓ(w), measured, in nat; the weight is put back."""
    weight = layer_weight(model, layer)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(delta)
        return objective.value(model) - reference
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _visit_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    visit: Callable[[Layer, nn.Module, Tensor], None],
) -> None:
    """Show every call of the layers: layer, module and input."""
    owners = {module: layer for layer in layers for module in layer_modules(model, layer)}
    visit_modules(model, owners, batches, lambda module, inputs, output: visit(owners[module], module, inputs))
