"""Lagrangian relaxation of a multiple-choice problem: the price of usage."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from lightning_caq.allocation.solver.constraint import Array, Columns
from lightning_caq.allocation.solver.convex_hull import hull_steps
from lightning_caq.allocation.solver.program import Program
from lightning_caq.errors import BudgetError

_MOST = 1e9  # of a limit that a choice is said to take; HiGHS refuses larger numbers, and less only lowers the bound


def best_multipliers(program: Program) -> Array:
    """The multipliers λ ≥ 0 that make the Lagrangian bound largest: there it equals the linear relaxation's optimum.

    With one constraint λ is the price of the first step along the rows' hulls that no longer fits whole; with more it
    comes from HiGHS. Whatever its tolerance, every λ ≥ 0 gives a bound that holds.

    Args:
        program: The problem.

    Returns:
        λ, in cost for a unit of usage, shape (constraints,).

    Raises:
        BudgetError: If no choice, not even a broken one, keeps all limits together.

    Example:
        >>> program = Program(np.array([[4.0, 1.0], [9.0, 1.0]]), np.array([[[0.0, 1.0]] * 2]), np.array([1.0]))
        >>> best_multipliers(program).tolist(), program.lagrangian(best_multipliers(program))
        ([3.0], 5.0)
    """
    if len(program.limits) == 1:
        steps = hull_steps(program.costs, program.usage[0])
        taken = program.usage[0, np.arange(len(steps.start)), steps.start].sum() + np.cumsum(steps.usage)
        first = int(np.searchsorted(taken, program.limits[0], side="right"))
        return np.array([steps.price[first] if first < len(steps.price) else 0.0])
    if not len(program.limits):
        return np.zeros(0)
    row, column = np.nonzero(np.isfinite(program.costs))
    scale = np.maximum(program.limits, 1.0)
    cost = program.costs[row, column]
    unit = float(np.abs(cost).max()) or 1.0
    result = linprog(  # type: ignore[call-overload]  # the stubs know no sparse A_eq
        cost / unit,
        A_ub=np.minimum(program.usage[:, row, column] / scale[:, None], _MOST),
        b_ub=program.limits / scale,
        A_eq=one_choice(row, len(program.costs)),
        b_eq=np.ones(len(program.costs)),
        method="highs",
    )
    if result.x is None:
        raise BudgetError(f"No choice keeps all limits together: {result.message}")
    return np.maximum(-np.asarray(result.ineqlin.marginals, dtype=np.float64), 0) * unit / scale


def one_choice(row: Columns, rows: int) -> csr_array:
    """The matrix that sums the choices of each row."""
    return csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(rows, len(row)))
