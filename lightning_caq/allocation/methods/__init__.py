"""Methods of allocation: one file each, found by its name.

There are two kinds. A *table method* turns a profile into a table cost[layer, bit-width] of predicted damage, which
the solver minimises; it never solves, rounds or prints. A *search method* chooses the bits itself, among those that a
budget allows, because its choice minimises no sum of costs. To add one, put a file here with a class called ``Method``,
or register your own with ``register_method``.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.search import SearchSpace
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_registered: dict[str, AllocationMethod | SearchMethod] = {}


class AllocationMethod(Protocol):
    """What a table method provides.

    Attributes:
        needs: Names of the measures it uses, from ``lightning_caq.measures.registry``.

    A method whose costs are changes of the loss in nat has a second attribute, ``in_nat = True``: those of rounded
    inputs can be added to them. One whose costs have another unit may say so, ``unit = "out²"``, and one that takes
    them from the network itself, with one layer rounded at a time, ``measured = True``.
    """

    needs: ClassVar[frozenset[str]]

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """Predicted damage of giving layer i b bits, shape (layers, bit-widths)."""


@runtime_checkable
class ComposingMethod(AllocationMethod, Protocol):
    """A table method whose costs are squared output errors, so that their sum can be a budget (CAQ 2.3)."""

    def floors(self, profile: CurvatureProfile, epsilon: float) -> NDArray[np.float64]:
        """Bits that each layer needs at least for an output error of ε, shape (layers,)."""


class SearchMethod(Protocol):
    """What a search method provides.

    Attributes:
        needs: Names of the measures it uses.
    """

    needs: ClassVar[frozenset[str]]

    def search(
        self,
        profile: CurvatureProfile,
        space: SearchSpace,
        evaluate: Callable[[tuple[int, ...]], float],
        seed: int,
    ) -> tuple[int, ...]:
        """Bits of every layer, within the space.

        ``evaluate`` gives the calibration objective of an allocation with nearest rounding, measured on the network.
        """


def available_methods() -> tuple[str, ...]:
    """Names of all methods, registered ones among them.

    Example:
        >>> "cet" in available_methods()
        True
    """
    return tuple(sorted({*_built_in(), *_registered}))


def get_method(name: str) -> AllocationMethod | SearchMethod:
    """The method called ``name``.

    Raises:
        OptionError: If there is none.
    """
    if name in _registered:
        return _registered[name]
    if name not in _built_in():
        raise OptionError(f"method={name!r} is not known; choose from {', '.join(map(repr, available_methods()))}.")
    method: AllocationMethod | SearchMethod = importlib.import_module(f"{__name__}.{name}").Method()
    return method


def is_search(method: AllocationMethod | SearchMethod) -> TypeIs[SearchMethod]:
    """Whether a method chooses the bits itself instead of giving a table of costs.

    Example:
        >>> is_search(get_method("random_search")), is_search(get_method("cet"))
        (True, False)
    """
    return hasattr(method, "search")


def register_method(name: str, method: AllocationMethod | SearchMethod) -> None:
    """Make a method of your own available under a name, wherever a method can be named.

    Args:
        name: Lower-case letters, digits and underscores, starting with a letter; not that of a built-in method. A name
            that was registered before gets the new method.
        method: An object with ``needs``, a frozenset of names of measures, and either ``costs`` or ``search``.

    Raises:
        OptionError: If the name is not allowed, or the object is no method.

    Example:
        >>> class Largest:
        ...     needs = frozenset({"rounding_error"})
        ...
        ...     def costs(self, profile, bits):
        ...         return np.array([[row.rounding_error[b] for b in bits] for row in profile.layers])
        >>> register_method("weight_mse", Largest())
        >>> "weight_mse" in available_methods()
        True
    """
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise OptionError(f"name={name!r} is not allowed; use lower-case letters, digits and _, such as 'my_method'.")
    if name in _built_in():
        raise OptionError(f"name={name!r} belongs to a built-in method; choose another.")
    needs = getattr(method, "needs", None)
    if isinstance(method, type) or not isinstance(needs, frozenset) or _kinds(method) != 1:
        raise OptionError(
            f"method={method!r} is no method; give an object (not a class) with a frozenset 'needs' and one of "
            "'costs(profile, bits)' or 'search(profile, space, evaluate, seed)'."
        )
    _registered[name] = method


def _built_in() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _kinds(method: object) -> int:
    return sum(callable(getattr(method, kind, None)) for kind in ("costs", "search"))
