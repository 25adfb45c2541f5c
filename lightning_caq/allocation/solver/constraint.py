"""Linear constraints on bits: what each choice of each layer uses of something, and how much of it there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_caq.errors import OptionError

Array = NDArray[np.float64]
Columns = NDArray[np.intp]
"""One column for each row of a table."""


@dataclass(frozen=True, eq=False)
class Constraint:
    """Σ usage[i, b_i] ≤ limit.

    Attributes:
        name: What is limited, such as ``"size"``.
        usage: What each choice takes of it, shape (layers, bit-widths); finite, not negative.
        limit: What all choices may take together. It is hard: whole numbers are compared as whole numbers.
        unit: The unit of both, for messages.

    Raises:
        OptionError: If usage or limit is not finite, or usage is negative or no table.

    Example:
        >>> Constraint("size", [[20, 40], [10, 20]], limit=50, unit="bits").total([1, 0])
        50.0
    """

    name: str
    usage: NDArray[np.float64]
    limit: float
    unit: str = ""

    def __post_init__(self) -> None:
        usage = np.asarray(self.usage, dtype=np.float64)
        if usage.ndim != 2 or not np.isfinite(usage).all() or (usage < 0).any():
            raise OptionError(f"The usage of '{self.name}' must be a table of finite numbers, none below 0.")
        if not np.isfinite(self.limit):
            raise OptionError(f"The limit of '{self.name}' is {self.limit}; give a finite number.")
        object.__setattr__(self, "usage", usage)

    def total(self, columns: ArrayLike) -> float:
        """Usage of a choice, given as one column for each layer."""
        return float(self.usage[np.arange(len(self.usage)), np.asarray(columns)].sum())


def size_limit(weights: Sequence[int], bits: Sequence[int], limit: float) -> Constraint:
    """Σ n_i b_i ≤ limit, in bits.

    Args:
        weights: n_i, weights of each layer.
        bits: The candidate bit-widths.
        limit: Bits that all weights may take together.

    Returns:
        The constraint.

    Example:
        >>> size_limit([10, 20], [2, 4], 90).usage
        array([[20., 40.],
               [40., 80.]])
    """
    return Constraint("size", np.multiply.outer(np.asarray(weights, float), np.asarray(bits, float)), limit, "bits")


def bops_limit(macs: Sequence[int], activation_bits: Sequence[int], bits: Sequence[int], limit: float) -> Constraint:
    """Σ m_i b_i b_a,i ≤ limit: bit operations of one sample (HAWQ-v3, Yao et al., 2021, §3.3).

    Args:
        macs: m_i, multiply–accumulates of each layer for one sample.
        activation_bits: b_a,i, bits of each layer's input; 32 for float32.
        bits: The candidate bit-widths of the weights.
        limit: Bit operations that all layers may take together.

    Returns:
        The constraint.

    Example:
        >>> bops_limit([100], [8], [2, 4], 2000).usage
        array([[1600., 3200.]])
    """
    operations = np.asarray(macs, float) * np.asarray(activation_bits, float)
    return Constraint("bops", np.multiply.outer(operations, np.asarray(bits, float)), limit, "bit operations")
