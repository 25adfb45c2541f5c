"""Search: the choices of bits that a budget allows, for methods that try allocations instead of adding up costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.errors import BudgetError

Bits = tuple[int, ...]
_ROUNDING = 1 + 1e-12  # sums of large whole numbers in float64


@dataclass(frozen=True)
class SearchSpace:
    """Bits b_1, …, b_k with Σ_i rate[c, i] b_i + beyond[b_i][c, i] ≤ limit[c] for every constraint c.

    Attributes:
        choices: Bit-widths that each layer may get, ascending; a layer with a single one is pinned.
        rates: What one bit of a layer's weights costs, shape (constraints, layers), none negative: n_i for a size in
            bits, m_i times the bits of the layer's input for BOPs.
        limits: What all layers may take together, shape (constraints,).
        beyond: By bit-width what layers take beyond that, as tables of values do; shape (constraints, layers). Empty
            where usage is proportional to the bits.

    Raises:
        BudgetError: If not even the smallest choice everywhere fits.

    Example:
        >>> space = SearchSpace(((2, 4), (2, 4)), np.array([[10.0, 30.0]]), np.array([110.0]))
        >>> space.fits((4, 2)), space.fits((2, 4))
        (True, False)
    """

    choices: tuple[tuple[int, ...], ...]
    rates: NDArray[np.float64]
    limits: NDArray[np.float64]
    beyond: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        smallest = tuple(choice[0] for choice in self.choices)
        if not self.fits(smallest):
            used = self.usage(smallest)
            worst = int((used / self.limits).argmax())
            raise BudgetError(
                f"The smallest choice of bits takes {used[worst]:.0f}, the budget allows {self.limits[worst]:.0f}; "
                "allow more or add smaller bit-widths."
            )

    def usage(self, bits: Sequence[int]) -> NDArray[np.float64]:
        """What some bits take of each constraint, shape (constraints,)."""
        used: NDArray[np.float64] = self.rates @ np.asarray(bits, dtype=np.float64)
        return used + sum(self.beyond[b][:, i] for i, b in enumerate(bits)) if self.beyond else used

    def fits(self, bits: Sequence[int]) -> bool:
        """Whether some bits are within every limit."""
        return bool((self.usage(bits) <= self.limits * _ROUNDING).all())

    def draw(self, rng: np.random.Generator) -> Bits:
        """A random allocation that fits and leaves no room: each layer's bits uniform at first, then settled."""
        return self.settle(tuple(int(rng.choice(choice)) for choice in self.choices), rng)

    def lower(self, bits: Bits) -> dict[int, Bits]:
        """By layer, the allocation with that layer a step down."""
        below = ((i, [b for b in self.choices[i] if b < now]) for i, now in enumerate(bits))
        return {i: (*bits[:i], max(steps), *bits[i + 1 :]) for i, steps in below if steps}

    def higher(self, bits: Bits) -> dict[int, Bits]:
        """By layer, the allocation with that layer a step up, whether it fits or not."""
        above = ((i, [b for b in self.choices[i] if b > now]) for i, now in enumerate(bits))
        return {i: (*bits[:i], min(steps), *bits[i + 1 :]) for i, steps in above if steps}

    def settle(self, bits: Bits, rng: np.random.Generator, kept: int | None = None) -> Bits:
        """An allocation near ``bits`` that fits and leaves no room for a step up of any layer but the one kept.

        Args:
            bits: An allocation, which may be too large.
            rng: Chooses the layers: random ones go a step down until all fits, then random ones a step up.
            kept: A layer to leave as it is, as long as the others can make room.

        Returns:
            The allocation.
        """
        while not self.fits(bits):
            steps = self.lower(bits)
            free = [i for i in steps if i != kept]
            bits = steps[int(rng.choice(free or list(steps)))]
        while steps := {i: b for i, b in self.higher(bits).items() if i != kept and self.fits(b)}:
            bits = steps[int(rng.choice(list(steps)))]
        return bits


def search_space(constraints: Sequence[Constraint], bits: Sequence[int]) -> SearchSpace:
    """The allocations within some constraints, the same bit-widths for every layer.

    Args:
        constraints: What is limited. The rate is the least usage for a bit, so what a table of values takes of the
            size is counted beyond it.
        bits: The bit-widths of their columns.

    Returns:
        The space.

    Raises:
        BudgetError: If not even the smallest choice everywhere fits.

    Example:
        >>> from lightning_caq.allocation.solver.constraint import size_limit
        >>> space = search_space([size_limit([10, 30], [2, 4], 110)], [2, 4])
        >>> space.choices, space.rates
        (((2, 4), (2, 4)), array([[10., 30.]]))
    """
    usage = np.array([constraint.usage for constraint in constraints])
    rates = (usage / np.asarray(bits)).min(2)
    beyond = usage - np.multiply.outer(rates, np.asarray(bits, dtype=np.float64))
    return SearchSpace(
        choices=(tuple(sorted(bits)),) * usage.shape[1],
        rates=rates,
        limits=np.array([constraint.limit for constraint in constraints], dtype=np.float64),
        beyond={b: beyond[:, :, column] for column, b in enumerate(bits)} if beyond.any() else {},
    )
