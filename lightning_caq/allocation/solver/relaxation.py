"""Relaxations by their duals: how good any allocation could be at best, and what the next bit would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lightning_caq.allocation.solver.choices import check_limits, check_table, make_choices
from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.allocation.solver.dual import best_multipliers
from lightning_caq.allocation.solver.hull import Array
from lightning_caq.allocation.solver.program import make_program
from lightning_caq.errors import BudgetError, OptionError

_LN4 = float(np.log(4.0))


@dataclass(frozen=True)
class Relaxation:
    """Optimum of a relaxation.

    Attributes:
        value: Σ cost of the relaxation; no allocation within the limits costs less.
        prices: By the constraint's name what one more unit of its limit would save, in cost a unit; 0 where the limit
            does not bind.
        bits: Real bits of each layer, where the relaxation has them.
    """

    value: float
    prices: dict[str, float]
    bits: tuple[float, ...] = ()


def relax_table(costs: ArrayLike, bits: Sequence[int], constraints: Sequence[Constraint]) -> Relaxation:
    """Let every layer have a mixture of bit-widths: the linear relaxation of the table, by its dual.

    The dual max_λ≥0 Σ_i min_b (cost[i, b] + λ · usage[i, b]) − λ · limit falls into layers. Σ cost of any allocation
    minus its value is that allocation's certificate, whatever method found it. Limits are first rounded down to what
    whole choices can use, which only makes the bound better.

    Args:
        costs: Shape (layers, bit-widths).
        bits: The bit-widths of the columns.
        constraints: The limits.

    Returns:
        The relaxation.

    Raises:
        BudgetError: If a limit is below the smallest choice.
        OptionError: If the table is not as it should be.

    Example:
        >>> from lightning_caq.allocation.solver.constraint import size_limit
        >>> relax_table([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size_limit([10, 20], (2, 4), 80)])
        Relaxation(value=9.0, prices={'size': 0.2}, bits=())
    """
    table = check_table(costs, bits)
    check_limits(make_choices(len(table), bits), constraints)
    program = make_program(table, constraints)
    multipliers = best_multipliers(program)
    units = [_unit(program.usage[k], each.usage) for k, each in enumerate(constraints)]
    prices = {each.name: float(m / u) for each, m, u in zip(constraints, multipliers, units, strict=True)}
    return Relaxation(program.lagrangian(multipliers), prices)


def relax_bits(
    noise: ArrayLike, weights: Sequence[int], limit: float, *, least: ArrayLike, most: ArrayLike
) -> Relaxation:
    """Minimise Σ c_i 4^−b_i over real bits, Σ n_i b_i ≤ limit and least ≤ b_i ≤ most: the relaxation of CAQ (CAQ 2.3).

    At a price λ of a bit of storage the Lagrangian c 4^−b + λ n b is least at b = log4(c ln 4 / (λ n)), clipped: bits
    that Σ n b is a falling function of, so bisection on log λ solves the dual, which here has no gap.

    Args:
        noise: c_i, the cost of layer i at 0 bits, shape (layers,); not negative.
        weights: n_i.
        limit: Bits that all weights may take together.
        least: Smallest bits, a number or one for each layer; floors p* go here.
        most: Largest bits.

    Returns:
        The optimum; its value is the dual's.

    Raises:
        BudgetError: If the least bits are more than the limit.
        OptionError: If a number is not finite or below 0, or the bits' range is empty.

    Example:
        >>> found = relax_bits([64.0, 1.0], [10, 10], 60, least=0, most=8)
        >>> [round(b, 6) for b in found.bits], round(found.value, 6), round(found.prices["size"], 6)
        ([4.5, 1.5], 0.25, 0.017329)
    """
    c, n = np.asarray(noise, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    low, high = (np.broadcast_to(np.asarray(each, dtype=np.float64), c.shape) for each in (least, most))
    if not c.size or c.shape != n.shape or not (np.isfinite(c) & (c >= 0) & np.isfinite(n) & (n > 0)).all():
        raise OptionError("noise must be one finite number from 0 up for each layer, and weights one above 0.")
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise OptionError(f"least={least!r} and most={most!r} must be finite and leave room between them.")
    if n @ low > limit * (1 + 1e-12):
        raise BudgetError(f"The least bits take {n @ low:.10g} bits together, the budget allows {limit:.10g}.")

    def bits_at(log_price: float) -> Array:
        with np.errstate(divide="ignore"):  # no noise: no bits above the least
            return np.clip((np.log(c * _LN4 / n) - log_price) / _LN4, low, high)

    if n @ np.where(c > 0, high, low) <= limit:
        bits, price = np.where(c > 0, high, low), 0.0
    else:
        slope = np.log(c[c > 0] * _LN4 / n[c > 0])
        cheap, dear = float((slope - _LN4 * high[c > 0]).min()), float((slope - _LN4 * low[c > 0]).max())
        while (middle := (cheap + dear) / 2) not in (cheap, dear):
            cheap, dear = (middle, dear) if n @ bits_at(middle) > limit else (cheap, middle)
        bits, price = bits_at(dear), float(np.exp(dear))
    value = float((c * 0.25**bits).sum() + price * (n @ bits - limit))
    return Relaxation(value, {"size": price}, tuple(float(b) for b in bits))


def noise_below(costs: ArrayLike, bits: Sequence[int]) -> Array:
    """The largest c_i with c_i 4^−b ≤ cost[i, b] for every b.

    With it ``relax_bits`` is a bound on the cost of every allocation of the table, and the gap a certificate.

    Args:
        costs: Shape (layers, bit-widths), not negative.
        bits: The bit-widths of the columns.

    Returns:
        c_i, shape (layers,).

    Raises:
        OptionError: If the table is not as it should be.

    Example:
        >>> noise_below([[1.0, 0.5], [1.0, 0.01]], (1, 2)).tolist()
        [4.0, 0.16]
    """
    table = check_table(costs, bits, least=0.0)
    return np.asarray((table * 4.0 ** np.asarray(bits, dtype=np.float64)).min(1))


def _unit(scaled: Array, usage: Array) -> float:
    """What a solver's unit of usage is in the user's."""
    largest = float(scaled.max())
    return float((usage - usage.min(1, keepdims=True)).max() / largest) if largest > 0 else 1.0
