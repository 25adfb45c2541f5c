"""Expansion: weights that modules multiply by themselves become layers, and stop being that.

The parameters of a network and the keys of its state dict are the same before and after. Only while weights are split
off do parts hold parameters, in the same memory, in place of those that they are parts of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import kind_of
from lightning_caq.network.parts.baked import bake, is_baked, is_computed, keep_baked, unbake
from lightning_caq.network.parts.expanded import Expanded, expanded_class, kind_of_owner
from lightning_caq.network.parts.kind import Kind
from lightning_caq.network.parts.part import View, WeightPart, make_part, parts_of, weight_identity
from lightning_caq.network.parts.uses import USES, find_uses, named_uses

_ORDER = "_lightning_caq_order"  # of the parameters of a module, while some of them are split off


def expand(model: nn.Module, names: Collection[str] | None = None) -> list[nn.Module]:
    """Give modules that multiply by weights of their own a part for each of these, in place; bake computed weights.

    Args:
        model: The network.
        names: Names of the layers that are wanted, those of parts among them; modules without any of them are left as
            they are. By default all are expanded.

    Returns:
        The modules that were changed, for ``collapse`` and ``settle_baked``; those that are expanded already are left
        as they are.

    Example:
        >>> net = nn.Sequential(nn.MultiheadAttention(4, 2))
        >>> _ = expand(net)
        >>> [name for name, _ in net.named_modules()], len(list(net.parameters()))
        (['', '0', '0.out_proj', '0.q_proj', '0.k_proj', '0.v_proj'], 4)
    """
    expanded = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Expanded):
            continue
        if kind_of(module) is not None and is_computed(module) and (names is None or name in names):
            bake(module)
            expanded.append(module)
            continue
        kind, prefix = kind_of_owner(module), f"{name}." if name else ""
        inside = None if names is None else [x.removeprefix(prefix) for x in names if x.startswith(prefix)]
        if kind is not None and (inside is None or inside):
            expanded += _expand(module, kind, kind.views(module))
        elif kind is None and (uses := named_uses(module, inside or ())):
            expanded += _expand(module, USES, uses)
    return expanded


def _expand(module: nn.Module, kind: Kind, views: Mapping[str, View]) -> list[nn.Module]:
    """Give a module its parts, unless a subclass has something else under the name of one."""
    if any(hasattr(module, part) for part in views):
        return []
    for part, view in views.items():
        module.add_module(part, make_part(module, view))
    module.__class__ = expanded_class(type(module), kind.name)
    return [module]


def expand_uses(model: nn.Module, batch: Any) -> None:
    """Give modules whose functions multiply by a weight a part for it, in place, inside ``every_weight_a_layer``.

    Args:
        model: The network, expanded already but for these.
        batch: A batch; it is run.

    Example:
        >>> class Tied(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = nn.Embedding(5, 3)
        ...     def forward(self, x):
        ...         return self.words(x) @ self.words.weight.T
        >>> net = Tied()
        >>> with every_weight_a_layer(net):
        ...     expand_uses(net, torch.tensor([[1, 2]]))
        ...     [name for name, _ in net.named_modules()]
        ['', 'words', 'words_weight_linear']
    """
    owned = {id(m) for m in model.modules() if isinstance(m, Expanded) or kind_of(m) is not None}
    for module, views in find_uses(model, lambda: run_model(model, batch), owned).items():
        for owner in _expand(module, USES, views):
            _split(owner, {})


def collapse(modules: Collection[nn.Module]) -> None:
    """Take the parts from modules, but for those below which something is quantized or split off."""
    for module in modules:
        if isinstance(module, Expanded) and not _in_use(module):
            replaced: Any = module._lightning_caq_replaced
            for name in [name for name, part in module.named_children() if isinstance(part, WeightPart)]:
                delattr(module, name)
            module.__class__ = replaced


def settle_baked(modules: Collection[nn.Module]) -> None:
    """Let baked weights stay parameters where they are quantized, and be computed again elsewhere."""
    for module in filter(is_baked, modules):
        (keep_baked if _in_use(module) else unbake)(module)


def _in_use(module: nn.Module) -> bool:
    """Whether something below a module is quantized, or split off."""
    return any(
        hasattr(type(m), "_lightning_caq_base") or (isinstance(m, WeightPart) and m.is_split) for m in module.modules()
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
    before = {m for m in model.modules() if isinstance(m, Expanded) or is_baked(m)}
    expand(model, names)
    try:
        yield
    finally:
        changed = [m for m in model.modules() if m not in before]
        collapse(changed)
        settle_baked(changed)


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
    before = {m for m in model.modules() if _ORDER in m.__dict__}
    weights: dict[Any, nn.Parameter] = {}
    try:
        for owner in [m for m in model.modules() if parts_of(m) and m not in before]:
            _split(owner, weights)
        yield
    finally:
        for owner in [m for m in model.modules() if _ORDER in m.__dict__ and m not in before]:
            _join(owner)


def _split(owner: nn.Module, weights: dict[Any, nn.Parameter]) -> None:
    """Give the parts of a module parameters; those that they share with another part, by identity, they get from it."""
    owner.__dict__[_ORDER] = list(owner._parameters)
    for part in parts_of(owner):
        key, whole = weight_identity(part), part.whole
        if part.view.shared:
            weights[key] = whole  # type: ignore[assignment]
        elif key not in weights:
            weights[key] = nn.Parameter(part.view.of(whole.detach()), requires_grad=whole.requires_grad)
        part._parameters["weight"] = weights[key]
    for name in _split_off(owner):
        owner.__dict__[name] = owner._parameters.pop(name)  # found there by the owner, and by nobody else


def _split_off(owner: nn.Module) -> list[str]:
    """Parameters of a module that its parts take the place of."""
    return list({part.view.parameter: None for part in parts_of(owner) if not part.view.shared})


def _join(owner: nn.Module) -> None:
    """Take parameters from the parts of a module, and put their values into its own."""
    order: list[str] = owner.__dict__.pop(_ORDER)
    wholes = {name: owner.__dict__[name] for name in _split_off(owner)}
    packed = set(wholes)  # of which no part holds a parameter any more, but codes
    for part in parts_of(owner):
        weight: Tensor | None = part._parameters.pop("weight", None)
        if weight is None or part.view.shared:
            continue
        packed.discard(part.view.parameter)
        place = part.view.of(wholes[part.view.parameter].detach())
        if weight.data_ptr() != place.data_ptr():  # it was moved, as from half precision
            with torch.no_grad():
                place.copy_(weight.detach())
    for name, whole in wholes.items():
        if name in packed:  # what tells the owner shape and type, and takes no memory
            owner.__dict__[name] = torch.zeros((), dtype=whole.dtype, device=whole.device).expand(whole.shape)
        else:
            owner._parameters[name] = owner.__dict__.pop(name)
    parameters = {**owner._parameters}
    owner._parameters.clear()
    owner._parameters.update({name: parameters[name] for name in order if name in parameters})
    if packed and isinstance(owner, nn.RNNBase):
        owner._init_flat_weights()


@contextmanager
def every_weight_a_layer(model: nn.Module) -> Iterator[None]:
    """While open, the weights that modules multiply by themselves are parameters of layers too."""
    with expanded(model), split_weights(model):
        yield
