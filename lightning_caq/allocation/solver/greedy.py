"""A good choice at once: the best price first."""

from __future__ import annotations

import numpy as np

from lightning_caq.allocation.solver.constraint import Array
from lightning_caq.allocation.solver.convex_hull import hull_steps
from lightning_caq.allocation.solver.program import Program, Solution


def greedy(program: Program, multipliers: Array) -> Solution:
    """Walk down the hulls of all rows together, the best price first, and take every step that still fits.

    Args:
        program: The problem.
        multipliers: λ of its relaxation, which make one usage of several; shape (constraints,).

    Returns:
        A choice that keeps the limits, or none, and the bound of the relaxation.

    Example:
        >>> program = Program(np.array([[4.0, 1.0], [9.0, 1.0]]), np.array([[[0.0, 1.0]] * 2]), np.array([1.0]))
        >>> greedy(program, np.array([3.0])).columns.tolist()
        [0, 1]
    """
    bound = program.lagrangian(multipliers)
    steps = hull_steps(program.costs, np.tensordot(multipliers, program.usage, 1))
    columns, left = steps.start.copy(), program.left(steps.start)
    if (left < 0).any():
        return Solution(None, np.inf, bound)
    more = program.usage[:, steps.row, steps.target] - program.usage[:, steps.row, steps.source]
    whole = int((np.cumsum(more, 1) <= left[:, None]).all(0).cumprod().sum())  # steps that fit one after another
    columns[steps.row[:whole]] = steps.target[:whole]
    left = left - more[:, :whole].sum(1)
    for step in range(whole, len(steps.row)):
        if columns[steps.row[step]] == steps.source[step] and (more[:, step] <= left).all():
            columns[steps.row[step]] = steps.target[step]
            left = left - more[:, step]
    fits = program.fits(columns)
    return Solution(columns if fits else None, program.cost(columns) if fits else np.inf, bound)
