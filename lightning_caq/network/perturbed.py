"""Perturbed networks: other weights in some layers, for as long as the network is looked at, and then the old ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_caq.network.hooks import watching
from lightning_caq.network.layer_matrix import along_channels
from lightning_caq.network.layers import Layer, layer_modules, layer_weight


@contextmanager
def replaced_weights(model: nn.Module, layers: Sequence[Layer], values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, layers have other weights; the parameters stay the same objects.

    Costs one copy of the weights that are replaced.

    Args:
        model: The network.
        layers: The layers to change.
        values: Layer name to weight, for every layer.

    Example:
        >>> net, layer = nn.Linear(2, 1), Layer("", "linear", (1, 2), modules=("",))
        >>> with replaced_weights(net, [layer], {"": torch.tensor([[1.0, 2.0]])}):
        ...     net.weight.tolist()
        [[1.0, 2.0]]
    """
    weights = {layer.name: layer_weight(model, layer) for layer in layers}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(values[name])
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])


@contextmanager
def perturbed(
    model: nn.Module,
    layers: Sequence[Layer],
    errors: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """While open, weights have errors added to them, and outputs of layers are shifted.

    Args:
        model: The network.
        layers: The layers to change.
        errors: Layer name to Δ_i, for every layer.
        shifts: Layer name to what is added to its output, one number an output channel; layers that are not named are
            not shifted.

    Example:
        >>> net, layer = nn.Linear(2, 1), Layer("", "linear", (1, 2), modules=("",))
        >>> x, errors, shifts = torch.ones(1, 2), {"": torch.tensor([[1.0, 2.0]])}, {"": torch.tensor([-0.5])}
        >>> with torch.no_grad():
        ...     before = net(x)
        ...     with perturbed(net, [layer], errors, shifts):
        ...         round(float(net(x) - before), 4)
        2.5
    """
    shifted = shifts or {}
    owners = {m: layer for layer in layers if layer.name in shifted for m in layer_modules(model, layer)}

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        return output + along_channels(owners[module], shifted[owners[module].name], output)

    values = {layer.name: layer_weight(model, layer).detach() + errors[layer.name] for layer in layers}
    with watching(owners, hook), replaced_weights(model, layers, values):
        yield
