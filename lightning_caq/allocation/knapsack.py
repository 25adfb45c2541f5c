"""The one solver: the cheapest choice of one bit-width a layer within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from lightning_caq.errors import BudgetError

_TIE = 1e-6  # how much of the optimum's cost a choice with more bits may cost more, to break ties
_TOLERANCE = 1e-6  # the solver's own


@dataclass(frozen=True)
class Allocation:
    """Bits for every layer.

    Attributes:
        bits: Bit-width of each layer, in the order of the rows of the cost table.
        cost: Σ cost[i, b_i], in the unit of the table.
        bound: No choice within the budget costs less than this, as the solver proved.
    """

    bits: tuple[int, ...]
    cost: float
    bound: float


def solve(costs: ArrayLike, weights: Sequence[int], bits: Sequence[int], limit: float) -> Allocation:
    """Minimise Σ cost[i, b_i] subject to Σ n_i b_i ≤ limit: a multiple-choice knapsack, solved exactly by HiGHS.

    Args:
        costs: Predicted damage, shape (layers, bit-widths); finite.
        weights: n_i, weights of each layer.
        bits: The bit-widths of the columns.
        limit: Bits that all weights may take together.

    Returns:
        The optimum, to about a millionth of its cost; between choices closer than that, the one with more bits.

    Raises:
        BudgetError: If not even the smallest bit-width everywhere fits.
        ValueError: If a cost is NaN or infinite.

    Example:
        >>> solve([[4.0, 1.0], [9.0, 1.0]], weights=[10, 10], bits=[2, 4], limit=60).bits
        (2, 4)
    """
    table = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(table).all():
        raise ValueError(f"costs must be finite; row {int(np.argwhere(~np.isfinite(table))[0, 0])} is not.")
    sizes = np.multiply.outer(np.asarray(weights, dtype=np.float64), np.asarray(bits, dtype=np.float64))
    if sizes.min(1).sum() > limit * (1 + 1e-12):
        raise BudgetError(f"The smallest choice takes {sizes.min(1).sum():.0f} bits, the budget allows {limit:.0f}.")
    # In units of their common divisor sizes are small whole numbers: the solver's tolerance cannot break the limit.
    divisor = float(np.gcd.reduce(sizes.astype(np.int64), axis=None))
    few_bits = np.multiply.outer(np.asarray(weights) / np.sum(weights), 0.25 ** np.asarray(bits, dtype=np.float64))
    low = table.min(1, keepdims=True)
    excess, rows = table - low, np.arange(len(table))
    scale = float(excess.max()) or 1.0
    while True:
        # The solver works to absolute tolerances, so costs are brought to the scale of the optimum's total: a choice
        # that alone costs more than the best total known cannot be part of it.
        allowed = excess <= scale * (1 + 1e-9)
        result = milp(
            (np.where(allowed, excess / scale, 0.0) + _TIE * few_bits).ravel(),
            integrality=np.ones(table.size, dtype=np.int64),
            bounds=Bounds(0, allowed.ravel().astype(np.float64)),
            constraints=[
                LinearConstraint(_one_choice_a_layer(table.shape), 1, 1),
                LinearConstraint(sizes.ravel()[None] / divisor, -np.inf, np.floor(limit / divisor + 1e-9)),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise BudgetError(f"The solver found no allocation: {result.message}")
        picked = result.x.reshape(table.shape).argmax(1)
        total = float(excess[rows, picked].sum())
        if total <= 0 or total > 0.5 * scale:
            break
        scale = total
    cost = float(table[rows, picked].sum())
    proven = float(low.sum())
    if total > 0:  # otherwise every layer has its cheapest choice
        slack = _TIE * float(few_bits.max(1).sum()) + _TOLERANCE
        proven += (float(result.mip_dual_bound) - slack) * scale
    return Allocation(tuple(int(bits[column]) for column in picked), cost, bound=min(proven, cost))


def _one_choice_a_layer(shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.repeat(np.eye(shape[0]), shape[1], axis=1)
