"""Bisection: the smallest number that passes a test which costs something to take, and may be out of order."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

_ELSEWHERE = 0.25  # what a gap counts that only a test out of order would make worth looking into


def smallest_passing(passes: Callable[[float], bool], low: float, high: float, tests: int) -> float | None:
    """The smallest number between ``low`` and ``high`` that was seen to pass.

    Bisection between the smallest number that passed and the largest below it that failed. A test with noise may fail
    below a number that fails, or pass there: once a gap between other numbers that failed is four times as wide, its
    middle is tried too, and where that passes the search goes on below it. The last test is that of an end that nothing
    has ruled out: of ``high`` if no other number passed, of ``low`` if every number did.

    Args:
        passes: The test.
        low: The least number.
        high: The largest.
        tests: How many tests may be taken, from 1 up.

    Returns:
        The number; ``None`` if none passed.

    Example:
        >>> smallest_passing(lambda x: x >= 2.7, 2.0, 8.0, tests=5)
        2.75
        >>> smallest_passing(lambda x: True, 2.0, 8.0, tests=5)
        2.0
        >>> smallest_passing(lambda x: x >= 7.99, 2.0, 8.0, tests=3)
        8.0
        >>> smallest_passing(lambda x: 3 < x < 4 or x > 6, 2.0, 8.0, tests=8)  # fails at 5
        3.125
    """
    passed: float | None = None
    failed: list[float] = []
    for left in range(tests, 0, -1):
        if left == 1 and passed is None:
            place = high
        elif left == 1 and not any(x < (passed or high) for x in failed):
            place = low
        else:
            place = _next(low, high if passed is None else passed, failed)
        if passes(place):
            passed = place if passed is None else min(place, passed)
        else:
            failed.append(place)
    return passed


def _next(low: float, top: float, failed: list[float]) -> float:
    """The middle of the gap that is most worth looking into, the upper one of equals."""
    places = [low, *sorted(x for x in failed if x < top), top]
    gaps = list(pairwise(places))
    weights = [_ELSEWHERE] * (len(gaps) - 1) + [1.0]
    worth = {gap: (gap[1] - gap[0]) * weight for gap, weight in zip(gaps, weights, strict=True)}
    below, above = max(gaps, key=lambda gap: (worth[gap], gap))
    return (below + above) / 2
