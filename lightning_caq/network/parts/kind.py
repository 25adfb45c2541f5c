"""A kind of module that multiplies by weights of its own: into which parts they fall, and how parts carry that out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_caq.network.parts.part import View

Route = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Carries out an operator, given the module, the operator and its arguments; ``NotImplemented`` leaves it to torch."""


@dataclass(frozen=True)
class Kind:
    """Modules that multiply by weights of their own.

    Attributes:
        name: What they are called.
        covers: Whether a module is of this kind.
        views: The parts of a module by the names that they get inside it; none for a layer that is fused of others.
        route: How operators are carried out by parts.
        unwrapped: Whether what decorators were put around is run in place of a module's ``forward`` where calls of its
            parts matter.
    """

    name: str
    covers: Callable[[nn.Module], bool]
    views: Callable[[Any], dict[str, View]]
    route: Route
    unwrapped: bool = False


def arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults too.

    Example:
        >>> arguments(lambda x, factor=2: x * factor, (3,), {})
        {'x': 3, 'factor': 2}
    """
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def of_class(module: nn.Module, name: str, package: str) -> bool:
    """Whether a module is of a class of some package that is not imported for it.

    Example:
        >>> of_class(nn.Linear(1, 1), "Module", "torch")
        True
    """
    return any(x.__name__ == name and x.__module__.split(".")[0] == package for x in type(module).__mro__)
