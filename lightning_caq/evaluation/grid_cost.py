"""The cost of grids that a runtime asks for: how much more rounding errs on them than on grids chosen freely."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.quantizers.grids.values import Quantizer
from lightning_caq.sizes import Width


def restriction_cost(
    model: nn.Module, layers: Sequence[Layer], widths: Sequence[Width], *, restricted: Quantizer, free: Quantizer
) -> float:
    """Squared error of rounding to the nearest values of restricted grids, over that of free ones.

    Errors are taken relative to each layer's own weights, and summed over the layers.

    Args:
        model: The float network.
        layers: Its layers.
        widths: Bits of each layer.
        restricted: How grids are chosen.
        free: How they would be chosen otherwise.

    Returns:
        The ratio; 1 where neither makes an error.

    Example:
        >>> import torch
        >>> net = nn.Linear(64, 1)
        >>> layer = Layer("", "linear", (1, 64), modules=("",))
        >>> byte = Quantizer(symmetry="signed_byte")
        >>> restriction_cost(net, [layer], [8], restricted=byte, free=byte)
        1.0
    """

    def error(weight: Tensor, layer: Layer, width: Width, quantizer: Quantizer) -> float:
        values = quantizer.fit(weight, width, layer.channel_shape)
        return float((values.nearest(weight) - weight).square().sum() / weight.square().sum().clamp_min(1e-30))

    weights = [layer_weight(model, layer).detach().float() for layer in layers]
    sums = [
        sum(error(w, layer, b, quantizer) for w, layer, b in zip(weights, layers, widths, strict=True))
        for quantizer in (restricted, free)
    ]
    return sums[0] / sums[1] if sums[1] > 0 else 1.0
