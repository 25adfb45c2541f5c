"""Joint choices: the bits of each layer's weights and of its input, chosen together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lightning_caq.allocation.solver.constraint import Array, Constraint
from lightning_caq.allocation.solver.knapsack import Allocation, solve
from lightning_caq.errors import OptionError


@dataclass(frozen=True, eq=False)
class JointChoices:
    """Every pair of a weight's and an input's bit-width as one choice, column = b · A + a.

    Attributes:
        bits: Candidate bit-widths of weights, B of them.
        activation_bits: Candidate bit-widths of each layer's input, shape (layers, A). A layer whose input is given,
            such as the first, has the same one in all columns.

    Raises:
        OptionError: If ``activation_bits`` is no table.

    Example:
        >>> choices = JointChoices((2, 4), [[8, 8], [4, 8]])
        >>> choices.pairs([0, 2])
        ((2, 4), (8, 4))
    """

    bits: Sequence[int]
    activation_bits: ArrayLike

    def __post_init__(self) -> None:
        table = np.asarray(self.activation_bits)
        if table.ndim != 2 or not table.size:
            raise OptionError(
                f"activation_bits must be a table, a row of candidates for each layer; its shape is {table.shape}."
            )
        object.__setattr__(self, "activation_bits", table)

    @property
    def _inputs(self) -> Array:
        """Bits of the inputs as a table, shape (layers, A)."""
        return np.asarray(self.activation_bits, dtype=np.float64)

    @property
    def columns(self) -> range:
        """The choices."""
        return range(len(self.bits) * self._inputs.shape[1])

    def costs(self, weight_costs: ArrayLike, activation_costs: ArrayLike) -> Array:
        """Costs of the choices, shape (layers, B · A): those of the weight and of the input, added.

        Args:
            weight_costs: Shape (layers, B).
            activation_costs: Shape (layers, A), in the same unit.

        Raises:
            OptionError: If a table has another shape.
        """
        weights = self._table(weight_costs, len(self.bits), "weight_costs")
        inputs = self._table(activation_costs, self._inputs.shape[1], "activation_costs")
        return _flat(weights[:, :, None] + inputs[:, None, :])

    def of_weights(self, limit: Constraint) -> Constraint:
        """A limit on bits of weights alone, such as on the size, to which inputs count nothing."""
        usage = self._table(limit.usage, len(self.bits), f"usage of '{limit.name}'")
        return replace(limit, usage=_flat(usage[:, :, None] + 0.0 * self._inputs[:, None, :]))

    def bops_limit(self, macs: Sequence[int], limit: float) -> Constraint:
        """Σ m_i b_i b_a,i ≤ limit: bit operations of one sample (HAWQ-v3, Yao et al., 2021, §3.3)."""
        operations = np.multiply.outer(np.asarray(macs, float), np.asarray(self.bits, float))
        return Constraint("bops", _flat(operations[:, :, None] * self._inputs[:, None, :]), limit, "bit operations")

    def pairs(self, columns: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits of the weights and bits of the inputs of a choice, given as one column for each layer."""
        count = self._inputs.shape[1]
        bits = tuple(int(self.bits[c // count]) for c in columns)
        return bits, tuple(int(row[c % count]) for row, c in zip(self._inputs, columns, strict=True))

    def _table(self, table: ArrayLike, columns: int, name: str) -> Array:
        result = np.asarray(table, dtype=np.float64)
        if result.shape != (len(self._inputs), columns):
            raise OptionError(f"{name} has shape {result.shape}; it must be {(len(self._inputs), columns)}.")
        return result


def solve_joint(
    choices: JointChoices,
    weight_costs: ArrayLike,
    activation_costs: ArrayLike,
    constraints: Sequence[Constraint],
    *,
    names: Sequence[str] = (),
) -> tuple[tuple[int, ...], tuple[int, ...], Allocation]:
    """Choose the bits of weights and inputs together: a multiple-choice knapsack over pairs.

    Args:
        choices: The candidates.
        weight_costs: Predicted damage of rounding the weights, shape (layers, B).
        activation_costs: Predicted damage of rounding the inputs, shape (layers, A), in the same unit.
        constraints: Hard limits, from ``choices.of_weights`` and ``choices.bops_limit``.
        names: Names of the layers, for messages.

    Returns:
        Bits of the weights, bits of the inputs, and the solver's certificate, whose own ``bits`` are columns.

    Raises:
        BudgetError: If no choice keeps the limits.
        OptionError: If tables do not fit each other.

    Example:
        >>> choices = JointChoices((2, 4), [[8, 8], [4, 8]])
        >>> limit = choices.bops_limit([10, 10], 10 * 2 * 8 + 10 * 4 * 4)
        >>> solve_joint(choices, [[4.0, 3.0], [9.0, 1.0]], [[0.0, 0.0], [1.0, 0.5]], [limit])[:2]
        ((2, 4), (8, 4))
    """
    table = choices.costs(weight_costs, activation_costs)
    # The solver's labels only have to tell columns apart and to grow with precision, by which it breaks ties.
    allocation = solve(table, choices.columns, constraints, names=names)
    return *choices.pairs(allocation.bits), allocation


def _flat(table: Array) -> Array:
    """The last two axes, weights and inputs, as one."""
    return table.reshape(len(table), -1)
