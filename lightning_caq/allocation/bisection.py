"""Bisection: the smallest number that passes a test which costs something to take."""

from __future__ import annotations

from collections.abc import Callable


def smallest_passing(passes: Callable[[float], bool], low: float, high: float, tests: int) -> float | None:
    """The smallest number between ``low`` and ``high`` that was seen to pass, by bisection.

    A test that passes at one number is taken to pass above it. ``high`` itself is tested only if no other passed, with
    the last test.

    Args:
        passes: The test.
        low: The least number.
        high: The largest.
        tests: How many tests may be taken, from 1 up.

    Returns:
        The number, within (high − low) / 2^(tests − 1) of where the test begins to pass; ``None`` if none passed.

    Example:
        >>> smallest_passing(lambda x: x >= 2.6, 2.0, 8.0, tests=6)
        2.75
        >>> smallest_passing(lambda x: x >= 7.99, 2.0, 8.0, tests=3)
        8.0
    """
    found = None
    for _ in range(tests - 1):
        middle = (low + (high if found is None else found)) / 2
        if passes(middle):
            found = middle
        else:
            low = middle
    if found is None and passes(high):
        return high
    return found
