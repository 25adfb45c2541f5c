"""The one solver: the cheapest choice of one bit-width a layer within hard limits, or the smallest within an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from lightning_caq.allocation.solver.choices import Choices, check_limits, check_table, make_choices
from lightning_caq.allocation.solver.constraint import Array, Constraint
from lightning_caq.allocation.solver.minimise import minimise
from lightning_caq.errors import BudgetError, OptionError


@dataclass(frozen=True)
class Allocation:
    """Bits for every layer, with their certificate.

    Attributes:
        bits: Bit-width of each layer, in the order of the rows of the table.
        cost: The total that was minimised, in the unit of its table.
        bound: No choice within the limits has a smaller total: proven, with several limits up to the solver's
            tolerance of 1e-6.
        relaxed: Optimum of the linear relaxation, in which a layer may have a mixture of bit-widths and limits are
            rounded down to what whole choices can use.
        usage: What the choice takes of each limit, by the constraint's name.
        limit: The limits.
    """

    bits: tuple[int, ...]
    cost: float
    bound: float
    relaxed: float
    usage: Mapping[str, float] = field(default_factory=dict)
    limit: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """By how much the total exceeds the relaxation's, in the unit of the table."""
        return self.cost - self.relaxed


def solve(
    costs: ArrayLike,
    bits: Sequence[int],
    constraints: Sequence[Constraint],
    *,
    pinned: Mapping[int, int] | None = None,
    groups: Sequence[Sequence[int]] = (),
    floors: Sequence[float] = (),
    names: Sequence[str] = (),
) -> Allocation:
    """Minimise Σ cost[i, b_i] under linear constraints: a multiple-choice knapsack, solved exactly.

    Args:
        costs: Predicted damage, shape (layers, bit-widths); finite.
        bits: The bit-widths of the columns.
        constraints: Hard limits, such as on size and on bit operations.
        pinned: Bits of single layers, by index.
        groups: Indices of layers that have to share their bits.
        floors: The least bits of each layer, such as p* of CAQ; fractions are rounded up.
        names: Names of the layers, for messages.

    Returns:
        The optimum, to about a millionth of its cost; between choices closer than that, one with more bits. Under
        several limits HiGHS stops after some hundred nodes, and ``bound`` says how far from the optimum that may be.

    Raises:
        BudgetError: If no choice keeps the limits; the message says what the least is.
        OptionError: If a table or an argument is not as it should be.

    Example:
        >>> from lightning_caq.allocation.solver.constraint import size_limit
        >>> best = solve([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size_limit([10, 10], (2, 4), 60)])
        >>> best.bits, best.cost, best.usage
        ((2, 4), 5.0, {'size': 60.0})
    """
    table = check_table(costs, bits)
    rules = make_choices(len(table), bits, pinned=pinned, groups=groups, floors=floors, names=names)
    check_limits(rules, constraints)
    # Ties go to the choice with the least noise, n_i 4^-b of all that the first constraint counts.
    most = constraints[0].usage.max(1) if constraints else np.ones(len(table))
    few_bits = np.multiply.outer(most / (most.sum() or 1.0), 0.25 ** np.asarray(bits, dtype=np.float64))
    return _allocate(rules, table, few_bits, constraints)


def smallest(
    costs: ArrayLike,
    bits: Sequence[int],
    usage: ArrayLike,
    max_cost: float,
    *,
    pinned: Mapping[int, int] | None = None,
    groups: Sequence[Sequence[int]] = (),
    floors: Sequence[float] = (),
    names: Sequence[str] = (),
) -> Allocation:
    """Minimise Σ usage[i, b_i] subject to Σ cost[i, b_i] ≤ ε: CAQ's own problem (CAQ 2.3, 2.4).

    With usage n_i b the smallest network within an error, with usage m_i b the one of fewest bit operations.

    Args:
        costs: Error of each choice, A_i e_i(b) or its square; shape (layers, bit-widths), finite, not negative.
        bits: The bit-widths of the columns.
        usage: What is to be small, of the same shape.
        max_cost: ε, the largest sum of costs, in their unit.
        pinned: Bits of single layers, by index.
        groups: Indices of layers that have to share their bits.
        floors: The least bits of each layer, p* of CAQ.
        names: Names of the layers, for messages.

    Returns:
        The smallest choice, to about a millionth; its ``cost`` is Σ usage, and ``usage["error"]`` is Σ cost. Between
        sizes closer than that, one of smaller error.

    Raises:
        BudgetError: If no choice keeps the error; the message says what the least is.
        OptionError: If a table or an argument is not as it should be.

    Example:
        >>> best = smallest([[4.0, 1.0], [9.0, 1.0]], (2, 4), [[20, 40], [20, 40]], max_cost=6.0)
        >>> best.bits, best.cost, best.usage
        ((2, 4), 60.0, {'error': 5.0})
    """
    table, size = check_table(costs, bits, least=0.0), check_table(usage, bits, least=0.0)
    if size.shape != table.shape:
        raise OptionError(f"usage has shape {size.shape}, costs have {table.shape}; they must be the same.")
    rules = make_choices(len(table), bits, pinned=pinned, groups=groups, floors=floors, names=names)
    least = float(rules.allow(rules.merge(table)).min(1).sum())
    if not max_cost >= least * (1 - 1e-12):
        raise BudgetError(f"No choice of bits={tuple(bits)} has an error of {max_cost:g}; the least is {least:g}.")
    return _allocate(rules, size, table / (table.max(1).sum() or 1.0), [Constraint("error", table, max_cost)])


def _allocate(choices: Choices, costs: Array, ties: Array, constraints: Sequence[Constraint]) -> Allocation:
    merged = [Constraint(c.name, choices.merge(c.usage), c.limit, c.unit) for c in constraints]
    minimum = minimise(choices.allow(choices.merge(costs)), choices.merge(ties), merged)
    columns = choices.columns(minimum.columns)
    cost = float(costs[np.arange(len(costs)), columns].sum())
    return Allocation(
        tuple(int(choices.bits[c]) for c in columns),
        cost,
        bound=min(minimum.bound, cost),
        relaxed=min(minimum.relaxed, cost),
        usage={c.name: c.total(columns) for c in constraints},
        limit={c.name: float(c.limit) for c in constraints},
    )
