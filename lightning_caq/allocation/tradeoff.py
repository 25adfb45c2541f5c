"""Trade-off: what a profile alone says of sizes and costs, long after the network is gone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.methods import get_method, is_search
from lightning_caq.allocation.solver.constraint import size_limit
from lightning_caq.allocation.solver.frontier import frontier
from lightning_caq.allocation.solver.knapsack import Allocation, solve
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile


def allocate(profile: CurvatureProfile, *, method: str, bits: Sequence[int], avg_bits: float) -> Allocation:
    """The bits that a method gives every layer within a size, with the solver's certificate.

    Args:
        profile: What was measured, the method's needs among it.
        method: Name of a method that gives a table of costs.
        bits: The candidate bit-widths.
        avg_bits: Bits a weight on average, at most.

    Raises:
        OptionError: If the method searches instead of adding up costs, or a figure was not measured.
        BudgetError: If the smallest bits are above the budget.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> errors = {"a": {2: 1.0, 4: 0.25}, "b": {2: 3.0, 4: 0.75}}
        >>> rows = tuple(LayerCurvature(name, 10, 1, 10, carried_error=e) for name, e in errors.items())
        >>> allocate(CurvatureProfile(rows), method="caq", bits=(2, 4), avg_bits=3).bits
        (2, 4)
    """
    weights = [row.weights for row in profile.layers]
    limit = size_limit(weights, bits, avg_bits * sum(weights))
    return solve(_costs(profile, method, bits), bits, [limit], names=[row.name for row in profile.layers])


def tradeoff(profile: CurvatureProfile, *, method: str, bits: Sequence[int]) -> tuple[Allocation, ...]:
    """All allocations of a method that are the best at their size, from the smallest to the cheapest.

    They are the corners of the lower convex hull of sizes and costs; each one's ``usage["size"]`` is Σ n_i b_i in bits.

    Args:
        profile: What was measured, the method's needs among it.
        method: Name of a method that gives a table of costs.
        bits: The candidate bit-widths.

    Raises:
        OptionError: If the method searches instead of adding up costs, or a figure was not measured.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> errors = {"a": {2: 1.0, 4: 0.25}, "b": {2: 3.0, 4: 0.75}}
        >>> rows = tuple(LayerCurvature(name, 10, 1, 10, carried_error=e) for name, e in errors.items())
        >>> points = tradeoff(CurvatureProfile(rows), method="caq", bits=(2, 4))
        >>> [(point.bits, point.usage["size"]) for point in points]
        [((2, 2), 40.0), ((2, 4), 60.0), ((4, 4), 80.0)]
    """
    weights = [row.weights for row in profile.layers]
    return frontier(_costs(profile, method, bits), np.multiply.outer(weights, bits), bits)


def _costs(profile: CurvatureProfile, name: str, bits: Sequence[int]) -> NDArray[np.float64]:
    method = get_method(name)
    if is_search(method):
        raise OptionError(
            f"method={name!r} searches and adds up no costs; choose a method that gives a table of costs."
        )
    return method.costs(profile, bits)
