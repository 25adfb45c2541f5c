"""Bisection: the smallest number that passes a test which costs something to take."""

from __future__ import annotations

from collections.abc import Callable


def smallest_passing(passes: Callable[[float], bool], low: float, high: float, tests: int) -> float | None:
    """The smallest number between ``low`` and ``high`` that was seen to pass, by bisection.

    A test that passes at one number is taken to pass above it. The last test is that of an end that nothing has ruled
    out: of ``high`` if no other number passed, of ``low`` if every number did.

    Args:
        passes: The test.
        low: The least number.
        high: The largest.
        tests: How many tests may be taken, from 1 up.

    Returns:
        The number, within (high − low) / 2^(tests − 1) of where the test begins to pass if it is not ``high``; ``None``
        if none passed.

    Example:
        >>> smallest_passing(lambda x: x >= 2.7, 2.0, 8.0, tests=5)
        2.75
        >>> smallest_passing(lambda x: True, 2.0, 8.0, tests=5)
        2.0
        >>> smallest_passing(lambda x: x >= 7.99, 2.0, 8.0, tests=3)
        8.0
    """
    passed, failed = None, None
    for left in range(tests, 0, -1):
        below, above = low if failed is None else failed, high if passed is None else passed
        place = (below + above) / 2
        if left == 1 and passed is None:
            place = high
        elif left == 1 and failed is None:
            place = low
        if passes(place):
            passed = place
        else:
            failed = place
    return passed
