"""Costs that couple layers: rounding errors of two layers that add up, or cancel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lightning_caq.allocation.solver.choices import check_table
from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.allocation.solver.hull import Array, Columns
from lightning_caq.allocation.solver.knapsack import Allocation, solve
from lightning_caq.allocation.solver.program import Program, make_program
from lightning_caq.errors import OptionError


def couplings(factors: ArrayLike) -> Array:
    """Couplings u_i(b) · u_j(b') of vectors, such as the projections of rounding errors on eigenvectors.

    With H = AᵀA and u_i(b) = A Δ_i(b) they are Δ_i(b)ᵀ H_ij Δ_j(b'), and ½ Δᵀ H Δ = Σ_i ½ ‖u_i‖² + Σ_i<j u_i · u_j.

    Args:
        factors: u, shape (layers, bit-widths, m).

    Returns:
        The couplings, shape (layers, bit-widths, layers, bit-widths).

    Raises:
        OptionError: If the array has no three dimensions.

    Example:
        >>> couplings([[[1.0, 0.0]], [[2.0, 5.0]]])[:, 0, :, 0].tolist()
        [[1.0, 2.0], [2.0, 29.0]]
    """
    u = np.asarray(factors, dtype=np.float64)
    if u.ndim != 3:
        raise OptionError(f"factors must have the shape (layers, bit-widths, m); theirs is {u.shape}.")
    return np.tensordot(u, u, axes=(2, 2))


def solve_quadratic(
    costs: ArrayLike, pairs: ArrayLike, bits: Sequence[int], constraints: Sequence[Constraint]
) -> Allocation:
    """Minimise Σ_i cost[i, b_i] + ½ Σ_i≠j pairs[i, b_i, j, b_j] within the limits: local search from linear optima.

    It starts from the optimum of the costs alone, from that of a linear bound and from that of the costs plus the mean
    coupling, changes the bits of one or two layers at a time, the best first, until no such change helps, and keeps the
    best end. So it is never worse than the linear optimum, and not always the best of all. The bound is proven: that of
    the linear problem in which every coupling takes its smallest value (Gilmore, 1962; Lawler, 1963).

    Args:
        costs: Damage of each layer alone, ½ Δ_iᵀ H_ii Δ_i; shape (layers, bit-widths).
        pairs: Δ_i(b)ᵀ H_ij Δ_j(b'), shape (layers, bit-widths, layers, bit-widths); only its symmetric part counts, and
            a layer is not coupled with itself. See ``couplings`` for vectors.
        bits: The bit-widths of the columns.
        constraints: The limits.

    Returns:
        The best allocation found; ``relaxed`` is that of the bound's problem.

    Raises:
        BudgetError: If no choice keeps the limits.
        OptionError: If a table is not as it should be.

    Example:
        >>> from lightning_caq.allocation.solver.constraint import size_limit
        >>> pairs = couplings([[[3.0], [1.0]], [[-2.0], [0.0]]])  # two errors that cancel
        >>> found = solve_quadratic([[4.5, 0.5], [2.0, 0.0]], pairs, (2, 4), [size_limit([1, 1], (2, 4), 6)])
        >>> found.bits, found.cost  # the costs alone would give the first layer 4 bits, and 2.5 - 2 here
        ((4, 2), 0.5)
    """
    table = check_table(costs, bits)
    coupled = _checked(pairs, table.shape)
    bounding = solve(table + 0.5 * coupled.min(3).sum(2), bits, constraints)
    starts = [solve(table, bits, constraints), bounding, solve(table + 0.5 * coupled.mean(3).sum(2), bits, constraints)]
    column = {b: c for c, b in enumerate(bits)}
    program = make_program(table, constraints)
    ends = []
    for start in {start.bits: start for start in starts}.values():
        columns = _descend(program, coupled, np.array([column[b] for b in start.bits]))
        ends.append((_value(table, coupled, columns), tuple(columns.tolist())))
    cost, chosen = min(ends)
    return replace(
        bounding,
        bits=tuple(int(bits[c]) for c in chosen),
        cost=cost,
        bound=min(bounding.bound, cost),
        relaxed=min(bounding.relaxed, cost),
        usage={each.name: each.total(chosen) for each in constraints},
    )


def _checked(pairs: ArrayLike, shape: tuple[int, ...]) -> Array:
    coupled = np.asarray(pairs, dtype=np.float64)
    if coupled.shape != (*shape, *shape) or not np.isfinite(coupled).all():
        raise OptionError(f"pairs must be finite numbers of shape {(*shape, *shape)}; theirs is {coupled.shape}.")
    coupled = (coupled + coupled.transpose(2, 3, 0, 1)) / 2
    each = np.arange(shape[0])
    coupled[each, :, each, :] = 0.0
    return coupled


def _value(costs: Array, pairs: Array, columns: Columns) -> float:
    rows = np.arange(len(columns))
    chosen = pairs[rows[:, None], columns[:, None], rows[None], columns[None]]
    return float(costs[rows, columns].sum() + 0.5 * chosen.sum())


def _descend(program: Program, pairs: Array, columns: Columns) -> Columns:
    """The best change of one layer or of two together, again and again, while there is one."""
    costs, usage, rows = program.costs, program.usage, np.arange(len(program.costs))
    smallest = -1e-12 * (float(np.abs(costs).sum() + np.abs(pairs).sum()) or 1.0)
    while True:
        field = pairs[:, :, rows, columns].sum(2)  # what each choice's couplings with all others add up to
        single = costs + field
        single = single - single[rows, columns][:, None]
        more = usage - usage[:, rows, columns][:, :, None]
        left = program.left(columns)
        best, change = smallest, None
        for i in range(len(costs)):
            here = pairs[i] - pairs[i, columns[i]]  # (choices of i, layers, choices)
            both = single[i][:, None, None] + single + here - here[:, rows, columns][:, :, None]
            fits = np.all(more[:, i, :, None, None] + more[:, None] <= left[:, None, None, None], axis=0)
            fits[:, i] = False
            fits[:, i, columns[i]] = (more[:, i] <= left[:, None]).all(0)  # the second layer stays: one change alone
            both[:, i] = single[i][:, None]
            both[~fits] = np.inf
            if both.min() < best:
                b, j, c = np.unravel_index(int(both.argmin()), both.shape)
                best, change = float(both.min()), ((int(j), int(c)), (i, int(b)))
        if change is None:
            return columns
        columns = columns.copy()
        for row, column in change:
            columns[row] = column
