"""A multiple-choice problem in the form that its solvers take: one row, one choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.solver.constraint import Array, Columns, Constraint

_ROUNDING = 1e-12  # what a limit that is no whole number may be missed by, relatively: the error of adding up


@dataclass(frozen=True, eq=False)
class Program:
    """Minimise Σ costs[r, c_r] subject to Σ usage[k, r, c_r] ≤ limits[k], one column c_r for each row r.

    Attributes:
        costs: Shape (rows, choices); infinite where a choice is not allowed.
        usage: What a choice takes beyond the least of its row, shape (constraints, rows, choices).
        limits: What is left for that, shape (constraints,).
    """

    costs: Array
    usage: Array
    limits: Array

    def cost(self, columns: Columns) -> float:
        """Cost of a choice."""
        return float(self.costs[np.arange(len(columns)), columns].sum())

    def left(self, columns: Columns) -> Array:
        """What a choice leaves of each limit; below 0 where it takes too much."""
        left: Array = self.limits - self.usage[:, np.arange(len(columns)), columns].sum(1)
        return left

    def fits(self, columns: Columns) -> bool:
        """Whether a choice keeps all limits."""
        return bool((self.left(columns) >= 0).all())

    def only(self, allowed: NDArray[np.bool_]) -> Program:
        """The same problem with fewer choices."""
        return replace(self, costs=np.where(allowed, self.costs, np.inf))

    def reduced(self, multipliers: Array) -> Array:
        """What each choice costs beyond the best of its row when usage has a price, shape (rows, choices)."""
        priced = self.costs + np.tensordot(multipliers, self.usage, 1)
        return np.asarray(priced - priced.min(1, keepdims=True))

    def lagrangian(self, multipliers: Array) -> float:
        """A bound: no choice that keeps the limits costs less (weak duality; multipliers ≥ 0)."""
        priced = self.costs + np.tensordot(multipliers, self.usage, 1)
        return float(priced.min(1).sum() - multipliers @ self.limits)


@dataclass(frozen=True, eq=False)
class Solution:
    """The best choice that a solver knows, if any keeps the limits.

    Attributes:
        columns: One column for each row, or ``None``.
        cost: Its cost; infinite if there is none.
        bound: No choice that keeps the limits costs less.
    """

    columns: Columns | None
    cost: float
    bound: float


def make_program(costs: Array, constraints: Sequence[Constraint]) -> Program:
    """Bring constraints to units in which a solver's tolerance cannot break them.

    Whole numbers are divided by what they have in common and their limit is rounded down; other usage is scaled to a
    limit of a thousand.

    Args:
        costs: Shape (rows, choices); infinite where a choice is not allowed.
        constraints: The limits on the same rows and choices.

    Returns:
        The problem; a limit below 0 says that the least choice is too much.

    Example:
        >>> table = np.array([[20.0, 40.0], [40.0, 80.0]])
        >>> program = make_program(np.zeros((2, 2)), [Constraint("size", table, 90)])
        >>> program.usage.tolist(), program.limits.tolist()
        ([[[0.0, 1.0], [0.0, 2.0]]], [1.0])
    """
    usage, limits = np.zeros((len(constraints), *costs.shape)), np.zeros(len(constraints))
    for k, constraint in enumerate(constraints):
        least = np.where(np.isfinite(costs), constraint.usage, np.inf).min(1, keepdims=True)
        more = np.maximum(constraint.usage - least, 0)
        left = constraint.limit - float(least.sum())
        if (more == np.rint(more)).all() and more.max() < 2**53:
            unit = float(np.gcd.reduce(more.astype(np.int64), axis=None)) or 1.0
            left = np.floor(left / unit + 1e-9 + 4 * np.spacing(abs(constraint.limit) / unit))
        else:
            left += _ROUNDING * abs(constraint.limit)
            unit = max(left, float(more.max()) * _ROUNDING) / 1000
            left /= unit
        usage[k], limits[k] = more / unit, left
    return Program(costs, usage, limits)


def without_dominated(program: Program) -> Program:
    """Drop every choice that costs no less and uses no less of anything than another one of its row.

    Of equal choices the first stays.

    Args:
        program: The problem.

    Returns:
        The problem with the same optimum and fewer choices.

    Example:
        >>> program = Program(np.array([[3.0, 4.0, 1.0]]), np.array([[[0.0, 1.0, 2.0]]]), np.array([2.0]))
        >>> without_dominated(program).costs.tolist()
        [[3.0, inf, 1.0]]
    """
    tables = np.concatenate([program.costs[None], program.usage])
    mine, other = tables[:, :, :, None], tables[:, :, None, :]  # compared within each row, other choices last
    first = np.tri(program.costs.shape[1], k=-1, dtype=bool)  # the other one comes before mine
    no_better = (other <= mine).all(0)
    dominated = no_better & ((other < mine).any(0) | first)
    return program.only(np.logical_not(dominated.any(2)))
