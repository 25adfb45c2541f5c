"""Budgets: how small the network has to become, as a number of bits that its weights may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from lightning_caq.errors import BudgetError

FLOAT_BITS = 32
SCALE_BITS = 32
ZERO_POINT_BITS = 16


def overhead_bits(channels: int) -> int:
    """Bits of the scales and zero points of one layer, one pair an output channel (theory: sizes and ratios).

    Example:
        >>> overhead_bits(10)
        480
    """
    return channels * (SCALE_BITS + ZERO_POINT_BITS)


@dataclass(frozen=True)
class LayerSizes:
    """What a budget needs to know of the layers, in their order.

    Attributes:
        weights: Number of weights of each layer, n_i.
        channels: Number of output channels of each layer; each has one scale and one zero point.
        unquantized: Weights that stay in float32: all other parameters with two or more dimensions, those of excluded
            layers among them. Biases and the scales of norms count as no weights.
    """

    weights: tuple[int, ...]
    channels: tuple[int, ...]
    unquantized: int = 0

    @property
    def overhead(self) -> int:
        """Bits of all scales and zero points."""
        return sum(overhead_bits(c) for c in self.channels)

    def payload(self, bits: Sequence[int]) -> int:
        """Bits of the weights alone, Σ n_i b_i."""
        return sum(n * b for n, b in zip(self.weights, bits, strict=True))

    def avg_bits(self, bits: Sequence[int]) -> float:
        """Average bits of a quantized weight, Σ n_i b_i / Σ n_i; scales are not counted.

        Example:
            >>> LayerSizes(weights=(100, 300), channels=(10, 10)).avg_bits([8, 4])
            5.0
        """
        return self.payload(bits) / sum(self.weights)

    def ratio(self, bits: Sequence[int]) -> float:
        """Float32 size over quantized size of all weights, with scales, zero points and excluded layers counted."""
        left = FLOAT_BITS * self.unquantized
        return (FLOAT_BITS * sum(self.weights) + left) / (self.payload(bits) + self.overhead + left)


@dataclass(frozen=True)
class AvgBits:
    """At most this many bits a weight on average, Σ n_i b_i ≤ value · Σ n_i."""

    value: float

    def __str__(self) -> str:
        return f"avg_bits={self.value:g}"

    def limit(self, sizes: LayerSizes) -> float:
        """Bits that the weights may take together."""
        return self.value * sum(sizes.weights)


@dataclass(frozen=True)
class Ratio:
    """At least this compression: float32 size over quantized size, everything counted."""

    value: float

    def __str__(self) -> str:
        return f"ratio={self.value:g}"

    def limit(self, sizes: LayerSizes) -> float:
        """Bits that the weights may take together, after scales, zero points and excluded layers are paid for."""
        total = FLOAT_BITS * (sum(sizes.weights) + sizes.unquantized)
        return total / self.value - sizes.overhead - FLOAT_BITS * sizes.unquantized


Budget = AvgBits | Ratio


def make_budget(avg_bits: float | None, ratio: float | None, bits: Sequence[int]) -> Budget:
    """Build the one budget the user gave.

    Args:
        avg_bits: Average bits a weight, between the smallest and the largest of ``bits``.
        ratio: Compression ratio, above 1.
        bits: The candidate bit-widths.

    Returns:
        The budget.

    Raises:
        BudgetError: If none or both are given, or if the value is out of range.

    Example:
        >>> make_budget(3.0, None, (2, 4, 8))
        AvgBits(value=3.0)
    """
    given = {name: value for name, value in (("avg_bits", avg_bits), ("ratio", ratio)) if value is not None}
    if len(given) != 1:
        what = "no budget" if not given else "two budgets (" + ", ".join(f"{k}={v}" for k, v in given.items()) + ")"
        raise BudgetError(f"Got {what}; give exactly one of avg_bits (such as 3.0) or ratio (such as 10).")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"{name}={value!r} is no number; give one such as 3.0.")
    if avg_bits is not None:
        if not min(bits) <= avg_bits <= max(bits):
            raise BudgetError(
                f"avg_bits={avg_bits:g} cannot be met with bits={tuple(bits)}; "
                f"choose a value from {min(bits)} to {max(bits)}, or add bit-widths."
            )
        return AvgBits(float(avg_bits))
    assert ratio is not None
    if not (ratio > 1 and np.isfinite(ratio)):
        raise BudgetError(f"ratio={ratio:g} is not a compression; choose a finite value above 1, such as 10.")
    return Ratio(float(ratio))


def check_budget(budget: Budget, sizes: LayerSizes, bits: Sequence[int]) -> None:
    """Check that some choice of bits meets the budget and that the budget asks for no more than the largest one.

    Raises:
        BudgetError: If the smallest network is still too large, or the largest one smaller than asked for;
            the message names the nearest value that can be met.
    """
    limit, total = budget.limit(sizes), sum(sizes.weights)
    least, most = min(bits) * total, max(bits) * total
    smallest, largest = [min(bits)] * len(sizes.weights), [max(bits)] * len(sizes.weights)
    if limit < least - 1e-6:
        raise BudgetError(
            f"{budget} cannot be met: with every layer at {min(bits)} bits the network has "
            f"avg_bits={sizes.avg_bits(smallest):g} and ratio={sizes.ratio(smallest):.4g}, the most that "
            f"bits={tuple(bits)} allow; ask for less compression or add smaller bit-widths."
        )
    if limit > most * (1 + 1e-9) and isinstance(budget, Ratio):
        raise BudgetError(
            f"{budget} is already met with every layer at {max(bits)} bits (ratio={sizes.ratio(largest):.4g}); "
            f"ask for more compression or add larger bit-widths."
        )
