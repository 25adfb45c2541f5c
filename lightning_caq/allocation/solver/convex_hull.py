"""Lower convex hulls: the only choices of a layer that some price of its usage makes the best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_caq.allocation.solver.constraint import Array, Columns


@dataclass(frozen=True, eq=False)
class Steps:
    """Edges of the lower hulls of all rows, the steepest first; those of one row stay in their order.

    Attributes:
        start: Column of the least usage of each row, the cheapest of those; shape (rows,).
        row: The row that each step is in, shape (steps,).
        source: The column that it leaves.
        target: The column that it reaches.
        usage: What it uses more, above 0.
        price: What it saves for each unit of usage, above 0; falling.
    """

    start: Columns
    row: Columns
    source: Columns
    target: Columns
    usage: Array
    price: Array


def hull_steps(costs: Array, usage: Array) -> Steps:
    """Walk down the lower hull of every row at once, from its least usage to its least cost.

    The Lagrangian of a multiple-choice problem falls into rows, and at a multiplier λ each row is at the corner of its
    hull where prices pass λ: the sorted prices of all rows hold the whole dual function (Sinha and Zoltners, 1979).

    Args:
        costs: Shape (rows, choices); infinite where a choice is not allowed.
        usage: Shape (rows, choices), finite.

    Returns:
        The steps.

    Example:
        >>> steps = hull_steps(np.array([[9.0, 5.0, 0.0], [4.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 3.0]] * 2))
        >>> steps.start.tolist(), steps.row.tolist(), steps.target.tolist(), steps.price.tolist()
        ([0, 0], [0, 1, 1], [2, 1, 2], [4.5, 3.0, 1.0])
    """
    rows = np.arange(len(costs))
    usage = np.where(np.isfinite(costs), usage, np.inf)
    least = usage.min(1, keepdims=True)
    start = np.where(usage == least, costs, np.inf).argmin(1)
    now, last = start, np.full(len(rows), np.inf)
    edges: list[tuple[Columns, Columns, Columns, Array, Array]] = []
    while True:
        more = usage - usage[rows, now][:, None]
        saved = costs[rows, now][:, None] - costs
        price = np.divide(saved, more, out=np.zeros_like(costs), where=(more > 0) & (saved > 0))
        best = price.max(1)
        # Of the choices on one straight edge the nearest; rounding errors must not put a step before its predecessor.
        target = np.where(price == best[:, None], more, np.inf).argmin(1)
        moving = np.flatnonzero(best > 0)
        if not len(moving):
            break
        last = np.minimum(best, last)
        edges.append((moving, now[moving], target[moving], more[moving, target[moving]], last[moving]))
        now = np.where(best > 0, target, now)
    if not edges:
        none = np.zeros(0, dtype=np.intp)
        return Steps(start, none, none, none, np.zeros(0), np.zeros(0))
    row, source, to, extra, prices = (np.concatenate(parts) for parts in zip(*edges, strict=True))
    order = np.lexsort((np.arange(len(row)), row, -prices))
    return Steps(start, row[order], source[order], to[order], extra[order], prices[order])
