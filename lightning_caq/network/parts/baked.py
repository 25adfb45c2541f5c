"""Baked weights: those that a parametrization computes of other parameters become parameters themselves.

What inputs are multiplied by is what is quantized: the weight that ``torch.nn.utils.parametrize``, ``weight_norm``,
``spectral_norm`` or a mask of ``prune`` makes. A rounded weight has no place among the parameters that it was computed
of, whose norm would move it, so these are let go once the layer is quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

_BEFORE = "_lightning_caq_before"
_COMPUTING = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_OF_STATE = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
_HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def is_computed(module: nn.Module) -> bool:
    """Whether the weight of a module is computed of other parameters, and nothing else of it is.

    Example:
        >>> is_computed(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), is_computed(nn.Linear(2, 2))
        (True, False)
    """
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        return list(parametrizations) == ["weight"]
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _COMPUTING)]
    return bool(hooks) and all(getattr(hook, "name", getattr(hook, "_tensor_name", "")) == "weight" for hook in hooks)


def bake(module: Any) -> None:
    """Let the weight of a module be a parameter, in place; ``unbake`` undoes it.

    Args:
        module: A module of which ``is_computed`` is true.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> bake(layer)
        >>> layer, list(layer.state_dict())
        (Linear(in_features=2, out_features=2, bias=True), ['weight', 'bias'])
        >>> unbake(layer)
        >>> list(layer.state_dict())
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    of = [p for name, p in module.named_parameters() if name != "bias"]
    weight = nn.Parameter(_computed(module), requires_grad=any(p.requires_grad for p in of))
    attributes = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
    before = (module.__class__, attributes)
    if parametrize.is_parametrized(module):
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
    else:
        module.__dict__.pop("weight", None)
        for name in _HOOKS:
            hooks = module.__dict__[name]
            for key in [k for k, hook in hooks.items() if isinstance(_inner(hook), (*_COMPUTING, *_OF_STATE))]:
                del hooks[key]
        for tensors in (module._parameters, module._buffers):
            for name in [name for name in tensors if name.startswith("weight_")]:
                del tensors[name]
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": weight, **others})
    module.__dict__[_BEFORE] = before


def _inner(hook: Any) -> Any:
    return getattr(hook, "hook", hook)


def _computed(module: Any) -> torch.Tensor:
    training = module.training
    module.training = False  # norms are not to move as they are read
    try:
        with torch.no_grad():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, _COMPUTING):
                    hook(module, ())
            weight: Tensor = module.weight.detach().clone()
            return weight
    finally:
        module.training = training


def is_baked(module: nn.Module) -> bool:
    """Whether a module was baked and can be given back what it was."""
    return _BEFORE in module.__dict__


def unbake(module: nn.Module) -> None:
    """Give a module back what its weight is computed of."""
    module.__class__, attributes = module.__dict__[_BEFORE]
    module.__dict__.clear()
    module.__dict__.update(attributes)


def keep_baked(module: nn.Module) -> None:
    """Let go of what the weight of a module was computed of."""
    del module.__dict__[_BEFORE]
