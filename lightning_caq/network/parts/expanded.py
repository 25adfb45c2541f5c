"""Expanded modules: operators that a module applies to weights of its own are carried out by its parts.

Whatever the ``forward`` of a module looks like, it multiplies by an operator of torch. The operator is seen while
``forward`` runs, and the part that stands for the weight is called in its place. Fused layers, which would read the
weights of their children, see that operators are watched and take their plain path.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_caq.network.parts.attention import ATTENTION
from lightning_caq.network.parts.experts import EXPERTS
from lightning_caq.network.parts.kind import Kind, Route
from lightning_caq.network.parts.part import parts_of
from lightning_caq.network.parts.products import BAG, BILINEAR, CONV1D
from lightning_caq.network.parts.recurrent import CELL, RECURRENT
from lightning_caq.network.parts.uses import USES

FUSED = Kind(
    name="fused",
    covers=lambda module: isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)),
    views=lambda module: {},
    route=lambda module, func, args, kwargs: NotImplemented,
)
KINDS = {kind.name: kind for kind in (ATTENTION, RECURRENT, CELL, CONV1D, EXPERTS, BILINEAR, BAG, FUSED, USES)}


def kind_of_owner(module: nn.Module) -> Kind | None:
    """How a module multiplies by weights of its own; ``None`` if it does not.

    Example:
        >>> kind_of_owner(nn.LSTM(2, 3)).name, kind_of_owner(nn.Linear(2, 3))
        ('recurrent', None)
    """
    return next((kind for kind in KINDS.values() if kind.covers(module)), None)


class Expanded:
    """What is added to the class of a module whose operators are carried out by parts."""

    _lightning_caq_replaced: ClassVar[type[nn.Module]]  # the class it replaces
    _lightning_caq_kind: ClassVar[Kind]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        this: Any = self
        for part in parts_of(this):  # they come later, and are shown their own keys only
            part.loaded = prefix + part.view.parameter in state_dict

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on demand and has no importable name: copies and pickles name what it was made from.
        state = super().__reduce_ex__(protocol)[2]
        return _rebuild, (self._lightning_caq_replaced, self._lightning_caq_kind.name), state


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def expanded_class(base: type[nn.Module], name: str) -> type[nn.Module]:
    """The expanded subclass of a module class.

    Args:
        base: The class.
        name: Name of the kind.

    Example:
        >>> expanded_class(nn.LSTM, "recurrent").__name__
        'ExpandedLSTM'
    """
    if (base, name) not in _classes:
        names = {
            "__module__": __name__,
            "_lightning_caq_replaced": base,
            "_lightning_caq_kind": KINDS[name],
            "forward": _routed(base, KINDS[name]),
        }
        _classes[base, name] = type(f"Expanded{base.__name__}", (Expanded, base), names)
    return _classes[base, name]


def _routed(base: Any, kind: Kind) -> Callable[..., Any]:
    """The forward of a class, its operators carried out by parts."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = base.forward
        if kind.unwrapped and any(part.is_split or part.watched for part in parts_of(self)):
            run = inspect.unwrap(run)
        with _Routing(self, kind.route):
            return run(self, *args, **kwargs)

    return forward


def _rebuild(base: type[nn.Module], name: str) -> nn.Module:
    cls = expanded_class(base, name)
    return cls.__new__(cls)


class _Routing(TorchFunctionMode):
    """While it is entered, operators go by a module's route."""

    def __init__(self, module: Any, route: Route) -> None:
        super().__init__()
        self._module, self._route = module, route

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._route(self._module, func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if result is NotImplemented else result
