"""Methods of allocation: one file each, found by its name.

A method says what it needs to have measured and turns a profile into a table cost[layer, bit-width]. It never solves,
rounds or prints. To add one, put a file here with a class called ``Method``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_caq.measures.profile import CurvatureProfile


class AllocationMethod(Protocol):
    """What a method provides.

    Attributes:
        needs: Names of the measures it uses, from ``lightning_caq.measures.measure.MEASURES``.
    """

    needs: ClassVar[frozenset[str]]

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """Predicted damage of giving layer i b bits, shape (layers, bit-widths)."""


def available_methods() -> tuple[str, ...]:
    """Names of all methods.

    Example:
        >>> "cet" in available_methods()
        True
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get_method(name: str) -> AllocationMethod:
    """The method called ``name``."""
    method: AllocationMethod = importlib.import_module(f"{__name__}.{name}").Method()
    return method
