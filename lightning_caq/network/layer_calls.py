"""Layer calls: run a network over batches and look at what reaches each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, layer_modules


def visit_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    visit: Callable[[Layer, nn.Module, Tensor], None],
) -> None:
    """Run batches without gradients and show every call of the layers, zeros in place of padding.

    Args:
        model: The network, in eval mode.
        layers: The layers.
        batches: The batches to run.
        visit: Called with the layer, the module that holds its weight in this call, and the input.

    Example:
        >>> import torch
        >>> net, layer = nn.Linear(2, 1), Layer("fc", "linear", (1, 2), modules=("",))
        >>> show = lambda layer, module, inputs: print(layer.name, tuple(inputs.shape))
        >>> visit_layers(net, [layer], [torch.zeros(3, 2)], show)
        fc (3, 2)
    """
    layer_of = {module: layer for layer in layers for module in layer_modules(model, layer)}

    def show(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        visit(layer_of[module], module, inputs)

    visit_modules(model, layer_of, batches, show, padding="zeroed")
