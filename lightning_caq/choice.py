"""Choice: the bits that a method gives every layer within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_caq.allocation.knapsack import smallest, solve
from lightning_caq.allocation.methods import get_method, is_search
from lightning_caq.allocation.search import search_space
from lightning_caq.budget import Budget, ErrorBudget, LayerSizes
from lightning_caq.errors import BudgetError
from lightning_caq.measures.profile import CurvatureProfile

Bits = tuple[int, ...]


@dataclass(frozen=True)
class Chooser:
    """What every choice of bits for one network is made from.

    Attributes:
        profile: What was measured.
        sizes: Numbers of weights and operations of the layers.
        bits: The candidate bit-widths.
        output_norm: Root mean square norm of the network's outputs, by which an error budget is counted.
        evaluate: The calibration objective of an allocation with nearest rounding, for methods that search.
        seed: Seed of a search.
    """

    profile: CurvatureProfile
    sizes: LayerSizes
    bits: Sequence[int]
    output_norm: float
    evaluate: Callable[[Bits], float]
    seed: int

    def choose(self, method: str, budget: Budget) -> Bits:
        """Bits of every layer, in order.

        Args:
            method: Name of the method.
            budget: The budget; not a ``MaxDrop``, which is met by a search over size budgets.

        Returns:
            The bits.

        Raises:
            BudgetError: If no choice meets the budget, or the method cannot work within an error budget.

        Example:
            >>> from lightning_caq.budget import AvgBits
            >>> from lightning_caq.measures.profile import LayerCurvature
            >>> rows = tuple(LayerCurvature(name, weights=10, channels=1, macs=10) for name in "ab")
            >>> sizes = LayerSizes((10, 10), (1, 1))
            >>> Chooser(CurvatureProfile(rows), sizes, (2, 4), 1.0, lambda bits: 0.0, 0).choose("uniform", AvgBits(4))
            (4, 4)
        """
        found, names = get_method(method), [row.name for row in self.profile.layers]
        constraints = budget.constraints(self.sizes, self.bits)
        if isinstance(budget, ErrorBudget):
            floors = getattr(found, "floors", None)
            if is_search(found) or floors is None:
                raise BudgetError(f"{budget} needs a method that composes errors, such as 'caq'; got {method!r}.")
            epsilon = budget.value * self.output_norm
            # These costs are squares of output errors: their sum is Φ_rss².
            return smallest(
                found.costs(self.profile, self.bits),
                self.bits,
                np.multiply.outer(np.asarray(self.sizes.weights), np.asarray(self.bits)),
                epsilon**2,
                floors=np.minimum(floors(self.profile, epsilon), max(self.bits)),
                names=names,
            ).bits
        if is_search(found):
            return found.search(self.profile, search_space(constraints, self.bits), self.evaluate, self.seed)
        return solve(found.costs(self.profile, self.bits), self.bits, constraints, names=names).bits
