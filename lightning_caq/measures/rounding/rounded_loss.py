"""Rounded loss: the calibration objective with some or all layers rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor, nn

from lightning_caq.measures.rounding.rounding_errors import NearestErrors, nearest_errors
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.network.perturbed import perturbed
from lightning_caq.quantizers.grids.values import AFFINE, Quantizer


def loss_change(model: nn.Module, layer: Layer, objective: Objective, delta: Tensor, reference: float) -> float:
    """ℓ(w + Δ_i) − ℓ(w), measured, in nat; the weight is put back.

    Args:
        model: The float network, in eval mode.
        layer: The layer.
        objective: The objective ℓ.
        delta: Δ_i, in the shape of the weight.
        reference: ℓ(w).

    Example:
        >>> import torch
        >>> from lightning_caq.network.objective import make_objective
        >>> net, layer = nn.Linear(1, 1), Layer("", "linear", (1, 1), modules=("",))
        >>> objective = make_objective("distill", net, [torch.ones(3, 1)])
        >>> round(loss_change(net, layer, objective, torch.tensor([[0.5]]), 0.0), 4)  # ½ 0.5²
        0.125
    """
    with perturbed(model, [layer], {layer.name: delta}):
        return objective.value(model) - reference


def rounded_loss(
    model: nn.Module,
    layers: Sequence[Layer],
    objective: Objective,
    bits: Sequence[int],
    quantizer: Quantizer = AFFINE,
) -> Callable[[tuple[int, ...]], float]:
    """A function from the bits of all layers to the objective ℓ(w + Δ(b_1, …, b_k)), nat, with nearest rounding.

    What search methods call. Choices that were asked for before are remembered; each new one costs one forward pass
    over the samples. The weights are put back after each call. From the first call on it holds every layer's codes at
    every bit-width, a byte each, and a copy of the weights.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ.
        bits: The bit-widths that may be asked for.
        quantizer: The values that weights may take.

    Returns:
        The function; it takes one bit-width a layer, in the order of ``layers``.

    Example:
        >>> import torch
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(4, 2), torch.randn(8, 4)
        >>> loss = rounded_loss(net, find_layers(net, x), make_objective("distill", net, [x]), [2, 8])
        >>> loss((2,)) > loss((8,))
        True
    """

    @cache
    def errors(index: int) -> NearestErrors[int]:
        return nearest_errors(model, layers[index], bits, quantizer)

    @cache
    def loss(choice: tuple[int, ...]) -> float:
        chosen = {x.name: errors(i)[b] for i, (x, b) in enumerate(zip(layers, choice, strict=True))}
        with perturbed(model, layers, chosen):
            return objective.value(model)

    return loss
