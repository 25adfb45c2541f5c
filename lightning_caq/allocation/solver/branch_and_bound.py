"""Problems with any number of limits: branch and bound by HiGHS, from ``scipy.optimize.milp``."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lightning_caq.allocation.solver.lagrangian import one_choice
from lightning_caq.allocation.solver.program import Program, Solution
from lightning_caq.errors import BudgetError

_TOLERANCE = 1e-6  # the solver's own, for costs about as large as one
_NODES = 200  # of branch and bound; a count and not a time, so that every run ends at the same


def branch_and_bound(program: Program) -> Solution:
    """Solve a multiple-choice problem as an integer program.

    Args:
        program: The problem, its costs scaled so that the optimum is about one.

    Returns:
        The optimum, to about a millionth; where that takes too many nodes the best choice seen, and what is proven.

    Raises:
        BudgetError: If no choice keeps all limits, or none was found.

    Example:
        >>> program = Program(np.array([[4.0, 1.0], [9.0, 1.0]]), np.array([[[0.0, 1.0]] * 2]), np.array([1.0]))
        >>> branch_and_bound(program).columns.tolist()
        [0, 1]
    """
    # What alone takes too much is not part of any choice; left in, its size would spoil the solver's arithmetic.
    possible = np.isfinite(program.costs) & (program.usage <= program.limits[:, None, None]).all(0)
    if not possible.any(1).all():
        raise BudgetError("No choice keeps all limits together: of some layer every choice alone takes too much.")
    row, column = np.nonzero(possible)
    one = one_choice(row, len(program.costs))
    limits, bound = program.limits, -np.inf
    while True:
        # Limits of about one: rounding a choice that is whole up to the solver's tolerance then keeps them up to it.
        scale = np.maximum(limits, 1.0)
        result = milp(
            program.costs[row, column],
            integrality=np.ones(len(row), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(program.usage[:, row, column] / scale[:, None], -np.inf, limits / scale),
            ],
            options={"mip_rel_gap": _TOLERANCE, "node_limit": _NODES},
        )
        if limits is program.limits and result.mip_dual_bound is not None:
            bound = float(result.mip_dual_bound) - _TOLERANCE
        if result.x is None:
            raise BudgetError(f"No choice keeps all limits together: {result.message}")
        picked = np.full(program.costs.shape, -np.inf)
        picked[row, column] = result.x
        columns = picked.argmax(1)
        missed = np.minimum(program.left(columns), 0)
        if not missed.any():
            return Solution(columns, program.cost(columns), bound)
        limits = limits + 2 * missed  # over the limit by less than the solver's tolerance: that choice is taken away
