"""Rounded loss: the calibration objective with every layer rounded to nearest, for any choice of bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective


def rounded_loss(
    model: nn.Module, layers: Sequence[Layer], objective: Objective, bits: Sequence[int]
) -> Callable[[tuple[int, ...]], float]:
    """A function from the bits of all layers to the objective ℓ(w + Δ(b_1, …, b_k)), nat, with nearest rounding.

    What search methods call. Choices that were asked for before are remembered; each new one costs one forward pass
    over the samples. The weights are put back after each call. From the first call on it holds every layer's rounding
    errors at every bit-width: (number of bit-widths) copies of the weights.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ.
        bits: The bit-widths that may be asked for.

    Returns:
        The function; it takes one bit-width a layer, in the order of ``layers``.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(4, 2), torch.randn(8, 4)
        >>> loss = rounded_loss(net, find_layers(net, x), make_objective("distill", net, [x]), [2, 8])
        >>> loss((2,)) > loss((8,))
        True
    """
    weights = [layer_weight(model, layer) for layer in layers]
    floats = [weight.detach().clone() for weight in weights]

    @cache
    def errors(index: int) -> dict[int, Tensor]:
        return nearest_errors(model, layers[index], bits)

    @cache
    def loss(choice: tuple[int, ...]) -> float:
        try:
            with torch.no_grad():
                for index, (weight, b) in enumerate(zip(weights, choice, strict=True)):
                    weight.add_(errors(index)[b])
            return objective.value(model)
        finally:
            with torch.no_grad():
                for weight, values in zip(weights, floats, strict=True):
                    weight.copy_(values)

    return loss
