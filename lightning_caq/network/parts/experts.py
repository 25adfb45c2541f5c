"""Stacked experts: a parameter of three axes that is a matrix for each expert, every one a layer.

Where calls matter, experts are run one after the other, as the model's own code does. Where only weights matter, the
fused products of transformers are given the stack of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_caq.network.parts.kind import Kind
from lightning_caq.network.parts.part import View, WeightPart, parts_of

_PART = "_lightning_caq_part"  # what the weight of one expert is marked with
_PRODUCTS = {F.linear: False, torch.matmul: True, Tensor.matmul: True, Tensor.__matmul__: True}


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}


def _views(module: Any) -> dict[str, View]:
    return {
        f"{name}_{i}": View(name, index=i, transposed=module.is_transposed)
        for name, stack in _stacks(module).items()
        for i in range(len(stack))
    }


def _parts(module: nn.Module) -> dict[str, list[WeightPart]]:
    """The parts of every stack by its name."""
    found: dict[str, list[WeightPart]] = {}
    for part in parts_of(module):
        found.setdefault(part.view.parameter, []).append(part)
    return found


def _route(module: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _PRODUCTS and hasattr(args[1], _PART) and module.is_transposed == _PRODUCTS[func]:
        output = getattr(args[1], _PART)(args[0])
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return output if bias is None else output + bias
    if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in ("T", "mT"):
        return NotImplemented  # shape, type or device
    stacks = {id(getattr(module, name)): parts for name, parts in _parts(module).items()}
    if func is Tensor.__getitem__ and id(args[0]) in stacks and _one(args[1]):
        part: Any = stacks[id(args[0])][int(args[1])]
        weight = part.applied_weight
        weight = (weight.mT if part.view.transposed else weight)[:]  # a tensor of its own, to be marked
        setattr(weight, _PART, part)
        return weight
    if not any(id(x) in stacks for x in tree_leaves((args, kwargs))):
        return NotImplemented
    args, kwargs = tree_map_only(Tensor, lambda x: _stack(stacks[id(x)]) if id(x) in stacks else x, (args, kwargs))
    return func(*args, **kwargs)


def _one(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)


def _stack(parts: list[WeightPart]) -> Tensor:
    weights = torch.stack([part.applied_weight for part in parts])
    return weights.mT if parts[0].view.transposed else weights


EXPERTS = Kind(
    name="experts",
    covers=lambda module: hasattr(module, "is_transposed") and bool(_stacks(module)),
    views=_views,
    route=_route,
    unwrapped=True,
)
