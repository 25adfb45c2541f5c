"""From a table of costs to its cheapest choice: scaled, relaxed, reduced, and only then searched.

With one limit by dynamic programming over a core, with several or where that proves nothing by branch and bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_caq.allocation.solver.branch_and_bound import branch_and_bound
from lightning_caq.allocation.solver.constraint import Array, Columns, Constraint
from lightning_caq.allocation.solver.dynamic_programming import search_core
from lightning_caq.allocation.solver.greedy import greedy
from lightning_caq.allocation.solver.lagrangian import best_multipliers
from lightning_caq.allocation.solver.program import Program, Solution, make_program, without_dominated

_TIE = 1e-6  # how much of the optimum's cost the choice that ties prefer may cost more
_TOLERANCE = 1e-8  # costs closer than this part of the optimum's are equal


@dataclass(frozen=True, eq=False)
class Minimum:
    """The cheapest choice.

    Attributes:
        columns: One column for each row.
        bound: No choice within the limits costs less.
        relaxed: Optimum of the linear relaxation.
    """

    columns: Columns
    bound: float
    relaxed: float


def minimise(costs: Array, ties: Array, constraints: Sequence[Constraint]) -> Minimum:
    """Minimise Σ costs[r, c_r] within the limits, exactly; between equal costs minimise Σ ties[r, c_r].

    Args:
        costs: Shape (rows, choices); infinite where a choice is not allowed.
        ties: The same shape, from 0 up; the largest of each row add up to 1 at most.
        constraints: The limits.

    Returns:
        The optimum, to about a millionth of its cost; with several limits and many layers the bound may say less.

    Raises:
        BudgetError: If no choice keeps all limits.

    Example:
        >>> size = Constraint("size", [[20, 40], [20, 40]], 60)
        >>> minimise(np.array([[4.0, 1.0], [9.0, 1.0]]), np.zeros((2, 2)), [size]).columns.tolist()
        [0, 1]
    """
    low = costs.min(1, keepdims=True)
    whole = make_program(costs - low, constraints)
    relaxed = whole.lagrangian(best_multipliers(whole))
    rows, scale = np.arange(len(costs)), float(whole.costs[np.isfinite(whole.costs)].max())
    # Solvers work to absolute tolerances, so costs are brought to the scale of the optimum's total: a choice that alone
    # costs more than a total that is known cannot be part of it. A quick choice finds that scale, the exact one checks.
    for find in (_quick, _exact):
        while True:
            solution = find(_scaled(whole, ties, scale))
            total = np.inf if solution.columns is None else float(whole.costs[rows, solution.columns].sum())
            if scale == 0 or total > scale / 2:
                break
            scale = total
    assert solution.columns is not None
    proven = (solution.bound - _TIE * float(ties.max(1).sum())) * scale
    bound = min(max(proven, relaxed), total)
    return Minimum(solution.columns, bound + float(low.sum()), min(relaxed, bound) + float(low.sum()))


def _scaled(whole: Program, ties: Array, scale: float) -> Program:
    if scale == 0:  # every row can have its cheapest choice, and only ties are left
        return replace(whole, costs=np.where(whole.costs <= 0, ties, np.inf))
    return replace(whole, costs=whole.costs / scale + _TIE * ties).only(whole.costs <= scale * (1 + 1e-9))


def _quick(program: Program) -> Solution:
    program = without_dominated(program)
    return greedy(program, best_multipliers(program))


def _exact(program: Program) -> Solution:
    program = without_dominated(program)
    multipliers = best_multipliers(program)
    one = len(multipliers) == 1
    solution = search_core(program, float(multipliers[0]), _TOLERANCE) if one else greedy(program, multipliers)
    if solution.cost - solution.bound <= 2 * _TOLERANCE:
        return solution
    # What costs more beyond the relaxation than the best known choice does is not part of a better one.
    open_ = program.reduced(multipliers) <= solution.cost - program.lagrangian(multipliers) + _TOLERANCE
    proven_solution = branch_and_bound(program.only(open_))
    best = min(proven_solution, solution, key=lambda candidate: candidate.cost)
    return replace(best, bound=max(solution.bound, min(proven_solution.bound, solution.cost)))
