"""Budgets: how small the network has to become, or how good it has to stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np

from lightning_caq.allocation.solver.constraint import Constraint, bops_limit, size_limit
from lightning_caq.errors import BudgetError
from lightning_caq.sizes import FLOAT_BITS, GIGA, LayerSizes


@dataclass(frozen=True)
class AvgBits:
    """At most this many bits a weight on average, Σ n_i b_i ≤ value · Σ n_i."""

    value: float

    def __str__(self) -> str:
        return f"avg_bits={self.value:g}"

    def limit(self, sizes: LayerSizes) -> float:
        """Bits that the weights may take together."""
        return self.value * sum(sizes.weights)

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """The limit on the size."""
        return (size_limit(sizes.weights, bits, self.limit(sizes)),)


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

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """The limit on the size, that of tables among it."""
        weights = size_limit(sizes.weights, bits, self.limit(sizes))
        if sizes.quantizer == "affine" and not sizes.groups:
            return (weights,)
        tables = [[sizes.table(index, b) for b in bits] for index in range(len(sizes.weights))]
        return (replace(weights, usage=weights.usage + tables),)


@dataclass(frozen=True)
class Bops:
    """At most this many billion bit operations a sample, Σ m_i b_i b_a,i ≤ value · 10⁹ (HAWQ-v3, Yao et al., 2021).

    Given in billions, as papers state them: a layer of 10⁹ multiply–accumulates with weights of 4 and inputs of 8 bits
    takes 32. Inputs in float32 count 32 bits. Layers that are not quantized are not counted.
    """

    value: float

    def __str__(self) -> str:
        return f"bops={self.value:g}"

    def limit(self, sizes: LayerSizes) -> float:
        """Bit operations that the layers may take together."""
        return self.value * GIGA

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """The limit on bit operations."""
        return (bops_limit(sizes.macs, sizes.input_bits, bits, self.limit(sizes)),)


@dataclass(frozen=True)
class SizeAndBops:
    """A limit on the size and one on the bit operations, both hard."""

    size: AvgBits | Ratio
    bops: Bops

    def __str__(self) -> str:
        return f"{self.size}, {self.bops}"

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """Both limits."""
        return self.size.constraints(sizes, bits) + self.bops.constraints(sizes, bits)


@dataclass(frozen=True)
class ErrorBudget:
    """The smallest network whose predicted output error is at most this part of the output (CAQ 2.3).

    Of the networks, that is, whose layers have their floors p*_i of bits too (CAQ 2.4), up to the largest candidate.
    The value is ε / rms‖F(x)‖, a number without a unit: 0.01 asks for an error Φ of at most one percent of the root
    mean square norm of the network's outputs on the calibration samples. ``smallest`` takes ε in the unit of the
    costs: value · rms for errors that add up, its square for squared errors.
    """

    value: float

    def __str__(self) -> str:
        return f"error={self.value:g}"

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """None: size is what is minimised."""
        return ()


@dataclass(frozen=True)
class MaxDrop:
    """The smallest network whose validation metric is worse than the float network's by at most this much.

    Attributes:
        value: The drop, in the unit of the metric: 0.01 is one point of an accuracy from 0 to 1.
        monitor: Name of the metric as it is logged, such as ``"val_acc"``.
    """

    value: float
    monitor: str

    def __str__(self) -> str:
        return f"max_drop={self.value:g} ({self.monitor})"

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """None: each step of the search sets its own."""
        return ()


@dataclass(frozen=True)
class MaxBytes:
    """A file of at most this many bytes, all of it counted; for entropy-coded weights."""

    value: float

    def __str__(self) -> str:
        return f"max_bytes={self.value:.0f}"

    def constraints(self, sizes: LayerSizes, bits: Sequence[int]) -> tuple[Constraint, ...]:
        """None: real bytes are counted in a search."""
        return ()


Budget = MaxBytes | AvgBits | Ratio | Bops | SizeAndBops | ErrorBudget | MaxDrop

_EXAMPLES = {
    "max_bytes": "200_000",
    "avg_bits": "3.0",
    "ratio": "10",
    "bops": "1.5",
    "error": "0.01",
    "max_drop": "0.005",
}


def make_budget(
    *,
    bits: Sequence[int],
    avg_bits: float | None = None,
    ratio: float | None = None,
    bops: float | None = None,
    error: float | None = None,
    max_drop: float | None = None,
    monitor: str | None = None,
    max_bytes: float | None = None,
) -> Budget:
    """Build the budget the user gave: one of all, or ``bops`` together with ``avg_bits`` or ``ratio``.

    Args:
        bits: The candidate bit-widths; none where codes are entropy-coded.
        avg_bits: Average bits a weight, between the smallest and the largest of ``bits``.
        ratio: Compression ratio, above 1.
        bops: Bit operations of one sample, in billions, above 0.
        error: Output error as a part of the output, above 0.
        max_drop: Drop of the validation metric ``monitor``, from 0 up.
        monitor: The metric's name, with ``max_drop`` and only with it.
        max_bytes: Bytes of the file.

    Returns:
        The budget.

    Raises:
        BudgetError: If none or too many are given, or if a value is out of range.

    Example:
        >>> make_budget(avg_bits=3.0, bits=(2, 4, 8))
        AvgBits(value=3.0)
        >>> str(make_budget(avg_bits=3.0, bops=1.5, bits=(2, 4, 8)))
        'avg_bits=3, bops=1.5'
    """
    every = {
        "max_bytes": max_bytes,
        "avg_bits": avg_bits,
        "ratio": ratio,
        "bops": bops,
        "error": error,
        "max_drop": max_drop,
    }
    given = {name: value for name, value in every.items() if value is not None}
    _check_number_of_budgets(given)
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"{name}={value!r} is no number; give one such as {_EXAMPLES[name]}.")
    if (max_drop is None) != (monitor is None):
        has, lacks = ("max_drop", "monitor") if monitor is None else ("monitor", "max_drop")
        raise BudgetError(f"{has} is given without {lacks}; give both, such as max_drop=0.005 and monitor='val_acc'.")
    if error is not None:
        return ErrorBudget(_in_range("error", error, error > 0, "an error; choose a finite value above 0"))
    if max_drop is not None and monitor is not None:
        if not isinstance(monitor, str) or not monitor:
            raise BudgetError(f"monitor={monitor!r} is no name of a metric; give one such as 'val_acc'.")
        return MaxDrop(
            _in_range("max_drop", max_drop, max_drop >= 0, "a drop; choose a finite value from 0 up"), monitor
        )
    if max_bytes is not None:
        return MaxBytes(_in_range("max_bytes", max_bytes, max_bytes >= 1, "a size; choose a number of bytes"))
    size = _size_budget(avg_bits, ratio, bits)
    if bops is None:
        assert size is not None
        return size
    operations = Bops(_in_range("bops", bops, bops > 0, "a number of operations; choose a finite value above 0"))
    return operations if size is None else SizeAndBops(size, operations)


def _check_number_of_budgets(given: Mapping[str, float]) -> None:
    if len(given) == 1 or set(given) in ({"avg_bits", "bops"}, {"ratio", "bops"}):
        return
    listed = ", ".join(f"{k}={v}" for k, v in given.items())
    counts = {0: "no budget", 2: f"two budgets ({listed})"}
    what = counts.get(len(given), f"{len(given)} budgets ({listed})")
    raise BudgetError(
        f"Got {what}; give exactly one of avg_bits (such as 3.0), ratio (such as 10), max_bytes (such as 200_000), "
        "error (such as 0.01) or max_drop (such as 0.005); bops (such as 1.5) goes alone or with avg_bits or ratio."
    )


def _size_budget(avg_bits: float | None, ratio: float | None, bits: Sequence[int]) -> AvgBits | Ratio | None:
    if avg_bits is not None:
        if not bits:
            return AvgBits(_in_range("avg_bits", avg_bits, 0 < avg_bits <= 16, "an average; choose a value up to 16"))
        if not min(bits) <= avg_bits <= max(bits):
            raise BudgetError(
                f"avg_bits={avg_bits:g} cannot be met with bits={tuple(bits)}; "
                f"choose a value from {min(bits)} to {max(bits)}, or add bit-widths."
            )
        return AvgBits(float(avg_bits))
    if ratio is not None:
        return Ratio(_in_range("ratio", ratio, ratio > 1, "a compression; choose a finite value above 1, such as 10"))
    return None


def _in_range(name: str, value: float, allowed: bool, what: str) -> float:
    if not (allowed and np.isfinite(value)):
        raise BudgetError(f"{name}={value:g} is not {what}.")
    return float(value)


def check_budget(budget: Budget, sizes: LayerSizes, bits: Sequence[int], most: LayerSizes | None = None) -> None:
    """Check that some choice of bits meets the budget and that the budget asks for no more than the largest one.

    Errors and drops are not known before they are measured; for them there is nothing to check here.

    Args:
        budget: The budget.
        sizes: Sizes of the layers; where bits of inputs are chosen too, with the fewest of them.
        bits: Candidate bit-widths of weights.
        most: The sizes with the most bits of inputs, where these are chosen too.

    Raises:
        BudgetError: If the smallest network is still too large, or the largest one smaller than asked for;
            the message names the nearest value that can be met.
    """
    smallest, largest = [min(bits)] * len(sizes.weights), [max(bits)] * len(sizes.weights)
    if isinstance(budget, SizeAndBops):
        check_budget(budget.size, sizes, bits)
        _check_bops(budget.bops, sizes, smallest)
    elif isinstance(budget, Bops):
        _check_bops(budget, sizes, smallest)
        operations = (most or sizes).bops(largest)
        if budget.value > operations * (1 + 1e-9):
            raise BudgetError(
                f"{budget} is already met with every layer at {max(bits)} bits (bops={operations:.4g}); "
                f"ask for fewer operations or add larger bit-widths."
            )
    elif isinstance(budget, (AvgBits, Ratio)):
        limit = budget.limit(sizes)
        tables = sizes.tables if isinstance(budget, Ratio) else lambda bits: 0
        if limit < sizes.payload(smallest) + tables(smallest) - 1e-6:
            raise BudgetError(
                f"{budget} cannot be met: with every layer at {min(bits)} bits the network has "
                f"avg_bits={sizes.avg_bits(smallest):g} and ratio={sizes.ratio(smallest):.4g}, the most that "
                f"bits={tuple(bits)} allow; ask for less compression or add smaller bit-widths."
            )
        if limit > (sizes.payload(largest) + tables(largest)) * (1 + 1e-9) and isinstance(budget, Ratio):
            raise BudgetError(
                f"{budget} is already met with every layer at {max(bits)} bits (ratio={sizes.ratio(largest):.4g}); "
                f"ask for more compression or add larger bit-widths."
            )


def check_coded_budget(budget: Budget, sizes: LayerSizes) -> None:
    """Check that entropy-coded weights could meet a budget at all.

    Raises:
        BudgetError: If what is not coded is too large by itself.

    Example:
        >>> check_coded_budget(Ratio(20.0), LayerSizes((1000,), (1,), quantizer="stepped"))
    """
    if isinstance(budget, Ratio):
        left = FLOAT_BITS * sizes.unquantized + sizes.tables([0] * len(sizes.weights))
        most = FLOAT_BITS * (sum(sizes.weights) + sizes.unquantized) / left
        if budget.value >= most:
            raise BudgetError(
                f"{budget} cannot be met: weights that stay in float32 and steps alone allow ratios below {most:.4g}; "
                "ask for less compression, or quantize more layers."
            )


def _check_bops(budget: Bops, sizes: LayerSizes, smallest: Sequence[int]) -> None:
    if not any(sizes.macs):
        raise BudgetError(f"{budget} cannot be checked: the layers' multiply–accumulates are not known.")
    if budget.value < sizes.bops(smallest) * (1 - 1e-12):
        raise BudgetError(
            f"{budget} cannot be met: with every layer at {smallest[0]} bits the network takes "
            f"bops={sizes.bops(smallest):.4g}, the least; ask for more operations or add smaller bit-widths."
        )
