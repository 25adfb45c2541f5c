"""Random search: the best of 100 random allocations (CAQ proposal, 4.2, baseline 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from lightning_caq.allocation.search import SearchSpace
from lightning_caq.profile import CurvatureProfile

DRAWS = 100


class Method:
    """Draws 100 allocations within the budget and keeps the one with the smallest calibration objective.

    Layers get random bits; random ones are then lowered until the budget is met and raised until it is used up. Costs
    at most 100 evaluations of the network.

    Example:
        >>> space = SearchSpace(choices=((2, 4), (2, 4)), rates=np.array([[10.0, 10.0]]), limits=np.array([60.0]))
        >>> Method().search(CurvatureProfile(()), space, lambda bits: float(bits[0]), seed=0)
        (2, 4)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def search(
        self, profile: CurvatureProfile, space: SearchSpace, evaluate: Callable[[tuple[int, ...]], float], seed: int
    ) -> tuple[int, ...]:
        """The best of 100 random allocations."""
        rng = np.random.default_rng(seed)
        return min({space.draw(rng): None for _ in range(DRAWS)}, key=evaluate)
