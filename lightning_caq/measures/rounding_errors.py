"""Rounding errors: what nearest rounding does to a weight, to its layer's output and to the network's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.batches import batch_size
from lightning_caq.layers import Layer, apply_weight, layer_modules, layer_weight
from lightning_caq.objective import Objective
from lightning_caq.quantizers.affine import fit_grid
from lightning_caq.visits import visit_modules
from lightning_caq.widths import W


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
    model: nn.Module, layer: Layer, batches: Sequence[Any], deltas: Mapping[int, Tensor]
) -> dict[int, float]:
    """e_i(b): root mean square over samples of ‖Δ_i(b) z_i‖, in the unit of the layer's output.

    Args:
        model: The float network, in eval mode.
        layer: The layer.
        batches: The samples.
        deltas: Bits to Δ_i(b).

    Returns:
        Bits to e_i(b); zeros for a layer that no batch reaches.
    """
    sums = dict.fromkeys(deltas, 0.0)

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        for b, delta in deltas.items():
            sums[b] += float(apply_weight(module, delta, inputs).double().square().sum())

    _visit_layer(model, layer, batches, visit)
    samples = sum(map(batch_size, batches))
    return {b: (total / samples) ** 0.5 for b, total in sums.items()}


def input_statistics(model: nn.Module, layer: Layer, batches: Sequence[Any]) -> InputStatistics:
    """Size and spread of a layer's inputs; an embedding's words are one-hot vectors, of norm 1 each."""
    norms: list[Tensor] = []
    kept: list[Tensor] = []

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        norms.append(inputs.float().flatten(1).norm(dim=1).double())
        if len(kept) < 1:
            kept.append(inputs.float().flatten(1))

    if layer.kind == "embedding":
        return InputStatistics(1.0, 2.0**0.5)
    _visit_layer(model, layer, batches, visit)
    if not norms:
        return InputStatistics(0.0, 0.0)
    # The spread is taken over the first batch: the mean must be known before the distances are.
    z = kept[0]
    return InputStatistics(float(torch.cat(norms).square().mean().sqrt()), float(2 * (z - z.mean(0)).norm(dim=1).max()))


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


def _visit_layer(model: nn.Module, layer: Layer, batches: Sequence[Any], visit: Any) -> None:
    if layer.calls:
        visit_modules(model, layer_modules(model, layer), batches, visit, calls=layer.calls)
