"""The whole trade-off between cost and size, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lightning_caq.allocation.solver.choices import check_table
from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.allocation.solver.convex_hull import hull_steps
from lightning_caq.allocation.solver.knapsack import Allocation, solve
from lightning_caq.errors import OptionError


def frontier(
    costs: ArrayLike, usage: ArrayLike, bits: Sequence[int], *, limits: Sequence[float] = ()
) -> tuple[Allocation, ...]:
    """All allocations that some price of usage makes the best, from the smallest to the cheapest.

    They are the corners of the lower convex hull of all (usage, cost), and every one is the optimum at its own usage:
    gap and bound are exact. The multiplier passes each corner of each layer's hull once, so sorting these corners gives
    the whole curve. Between two neighbours lie further optima above the hull, which ``limits`` asks for.

    Args:
        costs: Predicted damage, shape (layers, bit-widths).
        usage: What each choice takes, such as n_i b, of the same shape.
        bits: The bit-widths of the columns.
        limits: Usages at which the exact optimum is wanted too.

    Returns:
        The allocations by rising usage and falling cost, none twice.

    Raises:
        BudgetError: If a limit is below the smallest usage.
        OptionError: If a table is not as it should be.

    Example:
        >>> points = frontier([[4.0, 1.0], [9.0, 1.0]], [[20, 40], [20, 40]], (2, 4))
        >>> [(p.bits, p.cost, p.usage["size"]) for p in points]
        [((2, 2), 13.0, 40.0), ((2, 4), 5.0, 60.0), ((4, 4), 2.0, 80.0)]
    """
    table, size = check_table(costs, bits), check_table(usage, bits, least=0.0)
    if size.shape != table.shape:
        raise OptionError(f"usage has shape {size.shape}, costs have {table.shape}; they must be the same.")
    steps, rows = hull_steps(table, size), np.arange(len(table))
    used = np.cumsum(np.append(size[rows, steps.start].sum(), steps.usage))
    saved = table[steps.row, steps.source] - table[steps.row, steps.target]
    total = np.cumsum(np.append(table.min(1).sum(), saved[::-1]))[::-1]  # from the cheapest on: nothing cancels
    chosen, points = [bits[column] for column in steps.start], []
    for step, (cost, taken) in enumerate(zip(total.tolist(), used.tolist(), strict=True)):
        if step:
            chosen[steps.row[step - 1]] = bits[steps.target[step - 1]]
        points.append(Allocation(tuple(chosen), cost, cost, cost, {"size": taken}, {"size": taken}))
    known = {point.bits for point in points}
    between = [solve(table, bits, [Constraint("size", size, limit)]) for limit in limits]
    points += list({point.bits: point for point in between if point.bits not in known}.values())
    return tuple(sorted(points, key=lambda point: (point.usage["size"], point.cost)))
