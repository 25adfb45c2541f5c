"""Problems with one limit: dynamic programming over the few rows that the relaxation leaves open, the core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_caq.allocation.solver.constraint import Array, Columns
from lightning_caq.allocation.solver.convex_hull import Steps, hull_steps
from lightning_caq.allocation.solver.program import Program, Solution

_STATES = 4096  # partial choices kept at a time


def search_core(program: Program, price: float, tolerance: float) -> Solution:
    """Open the rows one by one, the largest first, and keep all partial choices that may still lead to the optimum.

    Every partial choice is completed by the relaxation of the rows that are not open: broken at one step that is the
    least it can cost, rounded it is a whole choice. A partial choice is dropped when that least is more than the best
    whole choice costs, or when another one costs and uses no more. Dynamic programming with bounds on a growing core is
    Pisinger's (1995, "A minimal algorithm for the multiple-choice knapsack problem"); once the large rows are decided
    the small ones fill what is left almost as the relaxation does, so that few partial choices remain.

    Args:
        program: A problem with one constraint.
        price: The multiplier λ of its relaxation.
        tolerance: Costs that differ by less are equal.

    Returns:
        The best choice; its cost exceeds the bound by no more than the tolerance, unless more partial choices were
        worth keeping than are kept.

    Example:
        >>> program = Program(np.array([[4.0, 1.0], [9.0, 1.0]]), np.array([[[0.0, 1.0]] * 2]), np.array([1.0]))
        >>> search_core(program, 3.0, 1e-9).columns.tolist()
        [0, 1]
    """
    reduced, relaxed = program.reduced(np.array([price])), program.lagrangian(np.array([price]))
    usage, rows, base = program.usage[0], np.arange(len(program.costs)), reduced.argmin(1)
    others = reduced.copy()
    others[rows, base] = np.inf
    nearest = others.min(1)
    order = np.lexsort((nearest, -np.abs(usage[rows, others.argmin(1)] - usage[rows, base])))
    rest = _Rest.of(hull_steps(program.costs, usage), usage, price, base, order)
    best, room, complete = Solution(None, np.inf, relaxed), np.inf, True
    # A partial choice: what it costs beyond the relaxation, and what it leaves of the limit while other rows stay.
    beyond, left = np.zeros(1), program.left(base)
    trail: list[tuple[int, Columns, Columns]] = []
    for opened in range(len(order) + 1):
        if opened < len(order) and nearest[order[opened]] > room:
            continue
        least, rounded, steps = rest.complete(opened, left)
        winner = int((beyond + rounded).argmin())
        if relaxed + beyond[winner] + rounded[winner] < best.cost:
            columns = _follow(trail, winner, rest.take(opened, base, float(left[winner]), int(steps[winner])))
            if program.fits(columns) and program.cost(columns) < best.cost:
                best = Solution(columns, program.cost(columns), relaxed)
        room = best.cost - relaxed - tolerance
        keep = _worth_keeping(beyond + least, beyond + price * left, left, room)
        complete &= len(keep) <= _STATES
        if opened == len(order) or not len(keep):
            break
        keep = keep[np.argsort((beyond + least)[keep], kind="stable")[:_STATES]]
        row = int(order[opened])
        choices = np.flatnonzero(np.isfinite(reduced[row]) & (reduced[row] <= room))
        more = usage[row, choices] - usage[row, base[row]]
        beyond = (beyond[keep, None] + reduced[row, choices]).ravel()
        left = (left[keep, None] - more).ravel()
        trail.append((row, np.repeat(keep, len(choices)), np.tile(choices, len(keep))))
    return Solution(best.columns, best.cost, best.cost - tolerance if complete else relaxed)


def _worth_keeping(least: Array, cost: Array, left: Array, room: float) -> Columns:
    """The partial choices that may still lead to a better one than is known."""
    keep = np.flatnonzero(np.isfinite(least) & (least <= room))
    order = keep[np.lexsort((cost[keep], -left[keep]))]  # the least usage first
    before = np.append(np.inf, np.minimum.accumulate(cost[order]))[:-1]
    return order[cost[order] < before]


def _follow(trail: list[tuple[int, Columns, Columns]], state: int, columns: Columns) -> Columns:
    """Put the choices that led to a partial choice into ``columns``."""
    for row, parent, choice in reversed(trail):
        columns[row] = choice[state]
        state = int(parent[state])
    return columns


@dataclass(frozen=True, eq=False)
class _Side:
    """Steps of all rows away from the base, the nearest to the price first.

    Attributes:
        place: Where the step's row comes in the order of opening.
        row: The row.
        column: The column that the step leads to.
        usage: By how much usage changes, above 0.
        beyond: What the step costs more than its usage is worth.
    """

    place: Columns
    row: Columns
    column: Columns
    usage: Array
    beyond: Array

    def sums(self, opened: int) -> tuple[Array, Array]:
        """Usage and cost of the first 0, 1, 2, … steps in rows that are not open."""
        rest = self.place >= opened
        return np.append(0, np.cumsum(self.usage[rest])), np.append(0, np.cumsum(self.beyond[rest]))


@dataclass(frozen=True, eq=False)
class _Rest:
    """The relaxation of the rows that are not open, as steps up and down from the base."""

    price: float
    up: _Side
    down: _Side

    @classmethod
    def of(cls, steps: Steps, usage: Array, price: float, base: Columns, order: Columns) -> _Rest:
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        taken = usage[steps.row, steps.target] <= usage[steps.row, base[steps.row]]
        beyond = np.abs(steps.price - price) * steps.usage
        up, down = np.flatnonzero(~taken), np.flatnonzero(taken)[::-1]
        sides = ((up, steps.target), (down, steps.source))
        return cls(
            price, *(_Side(place[steps.row[i]], steps.row[i], to[i], steps.usage[i], beyond[i]) for i, to in sides)
        )

    def complete(self, opened: int, left: Array) -> tuple[Array, Array, Columns]:
        """For every partial choice the least cost of completing it, that of whole steps, and how many of these.

        Where something is left the steps up may use it, and what they leave is lost at its price; where too much is
        taken the steps down have to bring it back.
        """
        least, rounded = np.full(len(left), np.inf), np.full(len(left), np.inf)
        count = np.zeros(len(left), dtype=np.intp)
        fits = left >= 0
        usage, beyond = self.up.sums(opened)
        count[fits] = k = np.searchsorted(usage, left[fits], side="right") - 1
        rounded[fits] = beyond[k] + self.price * (left[fits] - usage[k])
        least[fits] = np.interp(left[fits], usage, beyond) + self.price * np.maximum(left[fits] - usage[-1], 0)
        usage, beyond = self.down.sums(opened)
        short = ~fits & (-left <= usage[-1])
        count[short] = k = np.searchsorted(usage, -left[short], side="left")
        rounded[short] = beyond[k] + self.price * (usage[k] + left[short])
        least[short] = np.interp(-left[short], usage, beyond)
        return least, rounded, count

    def take(self, opened: int, base: Columns, left: float, count: int) -> Columns:
        """The base with the first ``count`` whole steps in rows that are not open."""
        side = self.up if left >= 0 else self.down
        rest = np.flatnonzero(side.place >= opened)[:count]
        columns = base.copy()
        columns[side.row[rest]] = side.column[rest]
        return columns
