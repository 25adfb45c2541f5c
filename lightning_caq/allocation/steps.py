"""Steps: the continuous form of allocation, for codes that are entropy-coded.

With a step s_i in layer i, squared errors go with s_i² and bits with −log₂ s_i: damage Σ_i g_i s_i² and size are convex
in log s, and at the optimum every layer has the same slope of damage over bits, g_i s_i² = const (reverse
water-filling; Cover & Thomas, Elements of Information Theory, ch. 10). One multiplier then serves the whole network,
and a budget of bytes is a search for it.

Sensitivities g_i measured one layer at a time overstate how much layers differ, since later layers make up for part of
what earlier ones did. So steps go with g_i to a power between 0, equal steps, and the −½ of equal slope; which one is
best shows in the output error at equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.methods import get_method, is_search
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.profile import CurvatureProfile

EXPONENTS = (0.0, 0.25, 0.5)
"""Powers of 1 / g_i that steps are tried with."""

_SEARCHES = 12
_ROOM = 0.005  # part of the bytes that a budget may be left short of
_GRAIN = 8  # bytes; streams come in words of four
_FARTHEST = 4.0  # octaves that one guess may go


@dataclass(frozen=True)
class StepChoice:
    """Steps of all layers.

    Attributes:
        steps: One a layer, in the unit of its weights.
        inputs: Bits of each layer's input; empty where inputs stay in float32.
        exponent: The power of the sensitivities that they go with.
    """

    steps: tuple[float, ...]
    inputs: tuple[int, ...] = ()
    exponent: float = 0.0


def check_continuous(method: str) -> None:
    """Check that a method gives sensitivities.

    Raises:
        OptionError: If it chooses bit-widths itself.

    Example:
        >>> check_continuous("cet")
    """
    if is_search(get_method(method)):
        raise OptionError(
            f"method={method!r} chooses whole bit-widths by itself, and coding='entropy' has none; give a method "
            "with a table of costs, such as 'cet', 'caq' or 'uniform', or coding='fixed'."
        )


def sensitivities(method: str, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
    """What a unit of squared rounding error of each layer costs, by a method: the slope of its table of costs.

    Args:
        method: Name of a table method.
        profile: What was measured, rounding errors among it.
        bits: The bit-widths of the table.

    Returns:
        The geometric mean over bit-widths of cost / ‖Δ_i(b)‖², shape (layers,); for ``"uniform"``, ones. Bit-widths at
        which a cost is not above zero are left out.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, carried_error={2: 2.0, 3: 1.0}, rounding_error={2: 8.0, 3: 2.0})
        >>> sensitivities("caq", CurvatureProfile((row,)), (2, 3))
        array([0.5])
    """
    check_continuous(method)
    found = get_method(method)
    assert not is_search(found)
    if method == "uniform":
        return np.ones(len(profile.layers))
    costs = found.costs(profile, bits)
    errors = np.array([[row.rounding_error[b] for b in bits] for row in profile.layers], dtype=np.float64)
    usable = (costs > 0) & (errors > 0)
    slopes = np.log(np.where(usable, costs, 1.0) / np.where(usable, errors, 1.0))
    known = usable.any(1)
    means = np.where(known, (slopes * usable).sum(1) / np.maximum(usable.sum(1), 1), np.inf)
    if not known.any():
        return np.ones(len(profile.layers))
    # A layer without any cost is as insensitive as the least sensitive one that has some.
    return np.exp(np.where(known, means, means[known].min()))


def equal_slope(
    sensitivities: NDArray[np.float64], weights: Sequence[int], multiplier: float, exponent: float = 0.5
) -> tuple[float, ...]:
    """Steps s_i = multiplier · (g_i / ḡ)^−exponent, ḡ the geometric mean over weights.

    Args:
        sensitivities: g_i, above zero, shape (layers,).
        weights: Number of weights of each layer.
        multiplier: Geometric mean of the steps over weights.
        exponent: ½ for equal slope, 0 for equal steps.

    Example:
        >>> [round(s, 4) for s in equal_slope(np.array([4.0, 1.0]), [10, 10], 1.0)]
        [0.7071, 1.4142]
    """
    logs = np.log(sensitivities)
    mean = float(np.average(logs, weights=np.asarray(weights, dtype=np.float64)))
    return tuple((multiplier * np.exp(-exponent * (logs - mean))).tolist())


def search_multiplier(coded_bytes: Callable[[float], int], target: float, *, start: float, weights: int) -> float:
    """A multiplier whose bytes are within a budget and nearly use it up.

    False position between the nearest multipliers on either side, in octaves, where bytes are nearly linear; before
    there are two sides, by the slope that codes of such a size have, at most one bit a weight and octave. Bytes are not
    quite monotone, since every multiplier is a rounding of its own.

    Args:
        coded_bytes: Bytes that the codes take with a multiplier, falling as it grows but for noise.
        target: Most bytes that they may take.
        start: The first multiplier to try.
        weights: Number of weights.

    Returns:
        Of the multipliers that were tried the one with most bytes within the budget.

    Raises:
        BudgetError: If no multiplier comes down to the budget.

    Example:
        >>> tried = []
        >>> def coded(m):
        ...     tried.append(m)
        ...     return int(1000 * max(3 - np.log2(m), 0) / 8)
        >>> m = search_multiplier(coded, 250, start=4.0, weights=1000)
        >>> 242 <= coded(m) <= 250, len(tried) < 6
        (True, True)
    """
    room = max(_ROOM * target, _GRAIN)
    tried: dict[float, int] = {}
    multiplier = start
    for _ in range(_SEARCHES):
        tried[multiplier] = coded_bytes(multiplier)
        if target - room <= tried[multiplier] <= target:
            break
        multiplier = _next(tried, target, target - room / 2, weights)
    within = {m: size for m, size in tried.items() if size <= target}
    if not within:
        raise BudgetError(
            f"The codes cannot be made as small as {max(target, 0):,.0f} bytes: with the largest step that was tried "
            f"they take {min(tried.values()):,}. Ask for less compression."
        )
    return max(within, key=lambda m: within[m])


def _next(tried: Mapping[float, int], target: float, aim: float, weights: int) -> float:
    """The multiplier to try next."""
    low = max((m for m, size in tried.items() if size > target), default=None)  # too many bytes
    high = min((m for m, size in tried.items() if size <= target and m > (low or 0.0)), default=None)
    if low is None or high is None:
        edge, sign = (low, 1.0) if low is not None else (min(tried), -1.0)
        size = tried[edge]
        slope = weights / 8 * min(1.0, max(4 * size / weights, 0.05))  # bytes an octave
        least = 0.005 * 2.0 ** len(tried)  # noise must not hold the search where it is
        return float(edge * 2.0 ** (sign * min(max(abs(size - aim) / slope, least), _FARTHEST)))
    share = (tried[low] - aim) / max(tried[low] - tried[high], 1)
    return float(low * (high / low) ** min(max(share, 0.1), 0.9))
