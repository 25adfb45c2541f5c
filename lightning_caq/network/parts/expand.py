"""Expansion: weights that modules multiply by themselves become layers, and stop being that.

The parameters of a network and the keys of its state dict are the same before and after. Only while weights are split
off do parts hold parameters, in the same memory, in place of those that they are parts of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.parts.expanded import Expanded, expanded_class, kind_of_owner
from lightning_caq.network.parts.part import WeightPart, make_part, parts_of, weight_identity


def expand(model: nn.Module, names: Collection[str] | None = None) -> list[nn.Module]:
    """Give modules that multiply by weights of their own a part for each of these, in place.

    Args:
        model: The network.
        names: Names of the layers that are wanted, those of parts among them; modules without any of them are left as
            they are. By default all are expanded.

    Returns:
        The modules that were expanded, for ``collapse``; those that are expanded already are left as they are.

    Example:
        >>> net = nn.Sequential(nn.MultiheadAttention(4, 2))
        >>> _ = expand(net)
        >>> [name for name, _ in net.named_modules()], len(list(net.parameters()))
        (['', '0', '0.out_proj', '0.q_proj', '0.k_proj', '0.v_proj'], 4)
    """
    expanded = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = None if isinstance(module, Expanded) else kind_of_owner(module)
        prefix = f"{name}." if name else ""
        if kind is None or (names is not None and not any(x.startswith(prefix) for x in names)):
            continue
        views = kind.views(module)
        if any(hasattr(module, part) for part in views):
            continue  # a subclass has something else under the name of a part
        for part, view in views.items():
            module.add_module(part, make_part(module, view).train(module.training))
        module.__class__ = expanded_class(type(module), kind.name)
        expanded.append(module)
    return expanded


def collapse(modules: Collection[nn.Module]) -> None:
    """Take what ``expand`` added from modules, but for those that still have a part of another class, such as a
    fake-quant one.
    """
    for module in modules:
        if isinstance(module, Expanded) and not _in_use(module):
            for name in [name for name, part in module.named_children() if isinstance(part, WeightPart)]:
                delattr(module, name)
            module.__class__ = module._lightning_caq_replaced


def _in_use(module: nn.Module) -> bool:
    """Whether something below a module is quantized, or split off."""
    return any(
        hasattr(type(m), "_lightning_caq_base") or (isinstance(m, WeightPart) and m.is_split)
        for m in module.modules()
    )


@contextmanager
def expanded(model: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """While open, weights that modules multiply by themselves are parts of these; afterwards those in use are.

    Args:
        model: The network.
        names: Names of the layers that are wanted; see ``expand``.

    Example:
        >>> net = nn.LSTM(2, 3)
        >>> with expanded(net):
        ...     dict(net.named_children())
        {'ih_l0': LinearPart(in_features=2, out_features=12, bias=False),
         'hh_l0': LinearPart(in_features=3, out_features=12, bias=False)}
        >>> net
        LSTM(2, 3)
    """
    modules = expand(model, names)
    try:
        yield
    finally:
        collapse(modules)


@contextmanager
def split_weights(model: nn.Module) -> Iterator[None]:
    """While open, parts hold parameters, in the same memory, in place of those that they are parts of.

    So every weight is a parameter of a layer. What was written to the weights is in the network's own parameters
    afterwards, which are the objects that they were.

    Example:
        >>> net = nn.LSTM(2, 3, bias=False)
        >>> with expanded(net), split_weights(net):
        ...     list(net.state_dict())
        ['ih_l0.weight', 'hh_l0.weight']
        >>> list(net.state_dict())
        ['weight_ih_l0', 'weight_hh_l0']
    """
    owners = [m for m in model.modules() if parts_of(m) and not any(part.is_split for part in parts_of(m))]
    weights: dict[Any, nn.Parameter] = {}
    orders = []
    try:
        for owner in owners:
            orders.append((owner, list(owner._parameters)))
            _split(owner, weights)
        yield
    finally:
        for owner, order in reversed(orders):
            _join(owner, order)


def _split(owner: nn.Module, weights: dict[Any, nn.Parameter]) -> None:
    for part in parts_of(owner):
        key, whole = weight_identity(part), part.whole
        if key not in weights:
            weights[key] = nn.Parameter(part.view.of(whole.detach()), requires_grad=whole.requires_grad)
        part._parameters["weight"] = weights[key]
    for name in {part.view.parameter: None for part in parts_of(owner)}:
        owner.__dict__[name] = owner._parameters.pop(name)  # found there by the owner, and by nobody else


def _join(owner: nn.Module, order: list[str]) -> None:
    wholes = {part.view.parameter: part.whole for part in parts_of(owner)}
    kept = {part.view.parameter for part in parts_of(owner) if part.is_split}  # of the others parts hold codes now
    for part in parts_of(owner):
        weight: Tensor | None = part._parameters.pop("weight", None)
        place = part.view.of(wholes[part.view.parameter].detach())
        if weight is not None and weight.data_ptr() != place.data_ptr():  # it was moved, as from half precision
            with torch.no_grad():
                place.copy_(weight.detach())
    for name, whole in wholes.items():
        if name not in kept:  # what tells the owner shape and type, and takes no memory
            owner.__dict__[name] = torch.zeros((), dtype=whole.dtype, device=whole.device).expand(whole.shape)
        else:
            del owner.__dict__[name]
    parameters = {**owner._parameters, **{name: whole for name, whole in wholes.items() if name in kept}}
    owner._parameters.clear()
    owner._parameters.update({name: parameters[name] for name in order if name in parameters})
    if len(kept) < len(wholes) and isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


@contextmanager
def every_weight_a_layer(model: nn.Module) -> Iterator[None]:
    """While open, the weights that modules multiply by themselves are parameters of layers too."""
    with expanded(model), split_weights(model):
        yield
