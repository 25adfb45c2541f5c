"""Which bits each layer may have: candidates, floors, pinned layers and groups that share their bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_caq.allocation.solver.constraint import Array, Columns, Constraint
from lightning_caq.errors import BudgetError, OptionError


@dataclass(frozen=True, eq=False)
class Choices:
    """Rows of a problem, one for each layer or group of layers that share their bits.

    Attributes:
        bits: The bit-widths of the columns.
        row: The row of each layer, shape (layers,).
        allowed: Shape (rows, bit-widths).
        names: A name for each layer, for messages.
    """

    bits: tuple[int, ...]
    row: Columns
    allowed: NDArray[np.bool_]
    names: tuple[str, ...]

    def merge(self, table: Array) -> Array:
        """Sums over the layers of each row, shape (rows, bit-widths)."""
        merged = np.zeros(self.allowed.shape)
        np.add.at(merged, self.row, table)
        return merged

    def allow(self, table: Array) -> Array:
        """A table of rows with what is not allowed at infinity."""
        return np.where(self.allowed, table, np.inf)

    def columns(self, columns: Columns) -> Columns:
        """Columns of the layers from those of the rows."""
        return np.asarray(columns[self.row])


def make_choices(
    layers: int,
    bits: Sequence[int],
    *,
    pinned: Mapping[int, int] | None = None,
    groups: Sequence[Sequence[int]] = (),
    floors: Sequence[float] = (),
    names: Sequence[str] = (),
) -> Choices:
    """Check what was asked for and bring it into rows.

    Args:
        layers: Number of layers.
        bits: The candidate bit-widths.
        pinned: Bits of single layers, by index.
        groups: Indices of layers that share their bits.
        floors: The least bits of each layer, or nothing.
        names: Names of the layers, or nothing.

    Returns:
        The rows.

    Raises:
        OptionError: If an index is no layer, or a pinned layer's bits are no candidate, below its floor or not those of
            its group.
        BudgetError: If floors are above the largest candidate.

    Example:
        >>> choices = make_choices(3, (2, 4), pinned={1: 4}, groups=[[0, 2]])
        >>> choices.row.tolist(), choices.allowed.tolist()
        ([0, 1, 0], [[True, True], [False, True]])
    """
    pinned = pinned or {}
    called = tuple(names) or tuple(f"layer {i}" for i in range(layers))
    for what, given in (("names", names), ("floors", floors)):
        if len(given) not in (0, layers):
            raise OptionError(f"{what} has {len(given)} entries for {layers} layers.")
    for index in (*pinned, *(i for group in groups for i in group)):
        if not 0 <= index < layers:
            raise OptionError(f"There is no layer {index}; indices go from 0 to {layers - 1}.")
    allowed = np.ones((layers, len(bits)), dtype=bool)
    if len(floors):
        allowed = _above(np.asarray(floors, dtype=np.float64), bits, called)
    for index, b in pinned.items():
        if b not in bits:
            raise OptionError(f"{called[index]} is pinned to {b} bits, which are not among bits={tuple(bits)}.")
        if not allowed[index, list(bits).index(b)]:
            raise OptionError(f"{called[index]} is pinned to {b} bits, below its floor of {floors[index]:.3g}.")
        allowed[index] = np.asarray(bits) == b
    first = _first_of_group(layers, groups)
    kept, row = np.unique(first, return_inverse=True)
    merged = np.ones((len(kept), len(bits)), dtype=bool)
    np.logical_and.at(merged, row, allowed)
    for r in np.flatnonzero(~merged.any(1)):
        members = ", ".join(called[i] for i in np.flatnonzero(row == r))
        raise OptionError(f"{members} share their bits, but no bit-width is allowed for all of them.")
    return Choices(tuple(bits), row, merged, called)


def check_table(table: ArrayLike, bits: Sequence[int], *, least: float = -np.inf) -> Array:
    """A table of finite numbers with one column for each bit-width.

    Args:
        table: Shape (layers, bit-widths).
        bits: The candidate bit-widths.
        least: The least that a number may be.

    Returns:
        The table in float64.

    Raises:
        OptionError: If it is empty, of another shape, not finite or below ``least``.

    Example:
        >>> check_table([[1, 0]], (2, 4)).tolist()
        [[1.0, 0.0]]
    """
    result = np.asarray(table, dtype=np.float64)
    if result.ndim != 2 or not result.size or result.shape[1] != len(bits) or len(set(bits)) != len(bits):
        raise OptionError(
            f"costs must be a table with a row for each layer and a column for each of bits={tuple(bits)}; "
            f"its shape is {result.shape}."
        )
    for bad, what in ((~np.isfinite(result), "finite"), (result < least, f"at least {least:g}")):
        if bad.any():
            raise OptionError(f"costs must be {what}; row {int(np.argwhere(bad)[0, 0])} is not.")
    return result


def check_limits(choices: Choices, constraints: Sequence[Constraint]) -> None:
    """Check that every limit alone can be kept.

    Args:
        choices: What each layer may have.
        constraints: The limits.

    Raises:
        BudgetError: If one cannot; the message says the least usage, and which layers ask for more than they have to.
        OptionError: If a constraint is on other layers or bit-widths.

    Example:
        >>> check_limits(make_choices(1, (2, 4), floors=[3.0]), [Constraint("size", [[20, 40]], 30, "bits")])
        Traceback (most recent call last):
        ...
        lightning_caq.errors.BudgetError: The smallest choice takes 40 bits, the budget allows 30. Without floors, pins
        and groups it takes 20; they bind layer 0.
    """
    for constraint in constraints:
        if constraint.usage.shape != (len(choices.row), len(choices.bits)):
            raise OptionError(
                f"The usage of '{constraint.name}' has shape {constraint.usage.shape}, not a row for each of "
                f"{len(choices.row)} layers and a column for each of {len(choices.bits)} bit-widths."
            )
        usage = choices.merge(constraint.usage)
        least = float(choices.allow(usage).min(1).sum())
        if least <= constraint.limit * (1 + 1e-12):
            continue
        message = (
            f"The smallest choice takes {least:.10g} {constraint.unit}, the budget allows {constraint.limit:.10g}."
        )
        asking = np.flatnonzero((choices.allow(usage).min(1) > usage.min(1))[choices.row])
        if len(asking):
            which = ", ".join(choices.names[i] for i in asking)
            message += f" Without floors, pins and groups it takes {usage.min(1).sum():.10g}; they bind {which}."
        raise BudgetError(message)


def _above(floors: Array, bits: Sequence[int], names: Sequence[str]) -> NDArray[np.bool_]:
    if np.isnan(floors).any():
        raise OptionError(f"The floor of {names[int(np.isnan(floors).argmax())]} is not a number.")
    beyond = [f"{name} ({floor:.3g})" for name, floor in zip(names, floors, strict=True) if floor > max(bits)]
    if beyond:
        raise BudgetError(
            f"Floors above the largest bit-width, {max(bits)}: {', '.join(beyond)}; add larger bit-widths or allow a "
            "larger error."
        )
    return np.asarray(bits)[None] >= floors[:, None]


def _first_of_group(layers: int, groups: Sequence[Sequence[int]]) -> Columns:
    """For each layer the first layer that it shares bits with; groups with a layer in common are one."""
    first = np.arange(layers)
    for group in groups:
        members = np.isin(first, first[list(group)])
        first[members] = first[members].min() if members.any() else 0
    return first
