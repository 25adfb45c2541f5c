"""Swap: turn the modules of a network into fake-quant modules, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_caq.quantizers.fake_quant.modules import LEARNED, FakeQuant, fake_quant_class
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.values import Values

_BUFFERS = ("scale", "zero_point", "channel_bits", "basis", "table")  # of grids and of codebooks


def swap(model: nn.Module, grids: Mapping[str, Values], inputs: Mapping[str, InputGrid] | None = None) -> None:
    """Turn modules into fake-quant modules, in place.

    The class of each module changes; the module stays the same object with the same Parameters, hooks and state-dict
    keys, so optimizers, checkpoints and other references to it go on working. Nothing changes if a name is unknown.

    Args:
        model: The network; its weights are not touched.
        grids: Module name to grid or codebook.
        inputs: Module name to the grid of its input; other modules take their inputs as they are.

    Example:
        >>> import torch
        >>> from lightning_caq.quantizers.grids.affine import Grid
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> swap(net, {"0": Grid(4, torch.ones(2, 1), torch.zeros(2, 1))})
        >>> net, list(net.state_dict())
        (Sequential(
          (0): FakeQuantLinear(in_features=2, out_features=2, bias=True)
        ), ['0.weight', '0.bias'])
        >>> restore_modules(net)
        >>> net
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in grids}
    for name, module in modules.items():
        grid = grids[name]
        if not isinstance(module, FakeQuant):
            module.__class__ = fake_quant_class(type(module))
        module.bits, module.quantizer = grid.bits, grid.quantizer
        module.input_grid = (inputs or {}).get(name)
        module.quantizing = True
        here = grid.to(module.weight.device)
        for learned in LEARNED:
            module.register_parameter(learned, None)
        for part in _BUFFERS:
            numbers = getattr(here, part, None)
            # A copy: whoever writes into buffers, such as an average of weights, must not write into the plan.
            module.register_buffer(part, None if numbers is None else numbers.clone(), persistent=False)


def restore_modules(model: nn.Module) -> None:
    """Turn every fake-quant module back into the class it was; weights stay as they are."""
    for module in quantized_modules(model).values():
        module.__class__ = module.plain_class
        for name in ("bits", "quantizer", "input_grid", "quantizing", *_BUFFERS, *LEARNED):
            delattr(module, name)


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """The fake-quant modules of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuant)}
