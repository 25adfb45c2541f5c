"""Bias correction: what takes the mean of a rounding error out of a layer's output.

Inputs behind a ReLU have a mean, so a rounding error moves the mean of an output as well as its values. Such shifts are
the same for every sample: they add up or cancel over layers, where the rest of the errors is nearly uncorrelated. A
bias, or the mean of the batch-norm behind a layer, takes them out for nothing (Nagel et al. 2019, section 4.2), as
re-centring does after rounding. What composition says of a network is said of it with its shifts taken out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, apply_weight, layer_module, layer_modules
from lightning_caq.sizes import W


def correctable(model: nn.Module, layer: Layer) -> bool:
    """Whether something takes a shift of the layer's output: a batch-norm behind it, or its own bias.

    An embedding has neither: its rows have no bias in common.

    Example:
        >>> net = nn.Linear(2, 3, bias=False)
        >>> correctable(net, Layer("", "linear", (3, 2), calls=1, modules=("",)))
        False
    """
    biased = getattr(layer_module(model, layer), "bias", None) is not None
    return layer.kind != "embedding" and (layer.batchnorm is not None or biased)


def bias_corrections(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], deltas: Mapping[str, Mapping[W, Tensor]]
) -> dict[str, dict[W, Tensor]]:
    """−E[Δ_i(b) z_i] for every layer and bit-width, mean over samples, positions and calls.

    The error is linear in the input, so inputs are added up first: one forward pass, and one product of each layer and
    bit-width for each batch, as of a single sample.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples, along the first axis of what reaches a layer.
        deltas: Layer name to bits to Δ_i(b).

    Returns:
        Layer name to bits to a vector, float64, one number an output channel; layers that nothing corrects are
        missing, and so are those that no batch reaches.

    Example:
        >>> import torch
        >>> net, x = nn.Linear(2, 1), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> bias_corrections(net, [layer], [x], {"": {3: torch.tensor([[0.5, 0.25]])}})
        {'': {3: tensor([-1.2500], dtype=torch.float64)}}
    """
    owners = {m: layer for layer in layers if correctable(model, layer) for m in layer_modules(model, layer)}
    totals: dict[str, dict[W, Tensor]] = {}
    counts: dict[str, int] = {}

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        layer = owners[module]
        if layer.kind == "linear":
            summed = inputs.reshape(-1, inputs.shape[-1]).sum(0, keepdim=True)
        else:  # a convolution takes one sample alone too, without an axis for it
            summed = inputs.sum(0, keepdim=True) if inputs.ndim == len(layer.shape) else inputs
        counts[layer.name] = counts.get(layer.name, 0) + output.numel() // output.shape[layer.channel_axis]
        sums = totals.setdefault(layer.name, {})
        for b, delta in deltas[layer.name].items():
            error = apply_weight(module, delta, summed).movedim(layer.channel_axis, 0).flatten(1).double().sum(1)
            sums[b] = sums[b] + error if b in sums else error

    visit_modules(model, owners, batches, visit, padding="dropped")
    return {name: {b: -total / counts[name] for b, total in sums.items()} for name, sums in totals.items()}
