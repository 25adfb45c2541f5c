"""Validity: where the quadratic model of the loss is taken to hold (CET Eq. 7)."""

from __future__ import annotations

_TOLERANCE = 0.5  # a part of the measured change
_FLOOR = 1e-3  # nat: what noise may make of a change


def tolerated_gap(actual: float) -> float:
    """How far a prediction may be off a measured loss change for the quadratic model to hold there, nat.

    Half of the change, and never less than what noise may make of it.

    Example:
        >>> tolerated_gap(0.5), tolerated_gap(1e-6)
        (0.25, 0.001)
    """
    return max(_TOLERANCE * abs(actual), _FLOOR)


def is_predicted(actual: float, predicted: float) -> bool:
    """Whether the quadratic model holds where it predicts one loss change and another one is measured, both in nat.

    Example:
        >>> is_predicted(0.5, 0.3), is_predicted(0.5, 0.2), is_predicted(-1e-5, 9e-4)
        (True, False, True)
    """
    return abs(actual - predicted) <= tolerated_gap(actual)
