"""Swap: turn the modules of a network into fake-quant modules, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_caq.network.parts.expand import collapse, expand, settle_baked
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, fake_quant_class
from lightning_caq.quantizers.fake_quant.state import PREFIX, STATE, FakeQuantState
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.values import Values


def swap(model: nn.Module, grids: Mapping[str, Values], inputs: Mapping[str, InputGrid] | None = None) -> None:
    """Turn modules into fake-quant modules, in place; weights that other modules multiply by become parts of these.

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
    expanded = expand(model, grids.keys())
    try:
        modules: list[tuple[str, Any]] = [(name, model.get_submodule(name)) for name in grids]
    except AttributeError:
        collapse(expanded)
        settle_baked(expanded)
        raise
    for name, module in modules:
        if not isinstance(module, FakeQuant):
            module.__class__ = fake_quant_class(type(module))
        _forget(module)
        state = FakeQuantState(grids[name].to(module.weight.device), (inputs or {}).get(name))
        setattr(module, STATE, state)
    settle_baked(expanded)


def restore_modules(model: nn.Module) -> None:
    """Turn every fake-quant module back into the class it was, and parts into nothing; weights stay as they are."""
    for module in quantized_modules(model).values():
        module.__class__ = module._lightning_caq_base
        _forget(module)
    collapse(list(model.modules()))


def _forget(module: nn.Module) -> None:
    """Delete what a fake-quant module was given."""
    for name in [name for name in (*module.__dict__, *module._parameters) if name.startswith(PREFIX)]:
        delattr(module, name)


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """The fake-quant modules of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuant)}
