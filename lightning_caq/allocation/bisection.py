"""Bisection: the smallest number that passes a test which costs something to take."""

from __future__ import annotations

from collections.abc import Callable


def smallest_passing(passes: Callable[[float], bool], low: float, high: float, tests: int) -> float | None:
    """The smallest number between ``low`` and ``high`` that was seen to pass, by bisection.

    A test that passes at one number is taken to pass above it. The last test is that of ``high`` if no other number
    passed.

    Args:
        passes: The test.
        low: The least number.
        high: The largest.
        tests: How many tests may be taken, from 1 up.

    Returns:
        The number, within (high − low) / 2^tests of where the test begins to pass if it is not ``high``; ``None`` if
        none passed.

    Example:
        >>> smallest_passing(lambda x: x >= 2.7, 2.0, 8.0, tests=5)
        2.75
        >>> smallest_passing(lambda x: x >= 7.99, 2.0, 8.0, tests=3)
        8.0
    """
    found = None
    for left in range(tests, 0, -1):
        if found is None and left == 1:
            return high if passes(high) else None
        middle = (low + (high if found is None else found)) / 2
        if passes(middle):
            found = middle
        else:
            low = middle
    return found
