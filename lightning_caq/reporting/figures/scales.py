"""Scales: numbers made fit for drawing, and how two lists of them agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


def numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Numbers as an array, NaN where there is none.

    Example:
        >>> numbers([1, None]).tolist()
        [1.0, nan]
    """
    return np.array([np.nan if value is None else float(value) for value in values])


def lines(begins: ArrayLike, ends: ArrayLike, places: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Level lines as the points of a single one with gaps in it, which takes far fewer bytes than a line each.

    Example:
        >>> x, y = lines(0, [3, 4], [0, 1])
        >>> x.tolist(), y.tolist()
        ([0.0, 3.0, nan, 0.0, 4.0, nan], [0.0, 0.0, nan, 1.0, 1.0, nan])
    """
    left, right, up = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (begins, ends, places)))
    gap = np.full_like(up, np.nan)
    return np.stack([left, right, gap], axis=-1).ravel(), np.stack([up, up, gap], axis=-1).ravel()


def decades(values: ArrayLike) -> tuple[float, float]:
    """Whole decades that hold the positive values, with room for the smallest to be seen as a bar.

    Example:
        >>> decades([0.02, 30.0])
        (0.01, 100.0)
    """
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found) & (found > 0)]
    if not len(found):
        return 0.1, 10.0
    low, high = np.log10(found.min()) - 0.2, np.log10(found.max())
    return float(10 ** np.floor(low)), float(10 ** max(np.ceil(high), np.floor(low) + 1))


def tidy_log(axis: Axis) -> None:
    """Tick labels of a logarithmic axis: decades, or plain numbers in between where it spans less than two of them."""
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(NullFormatter())
    if low > 0 and high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation; ``None`` with fewer than four pairs, or where all of one side are equal.

    Example:
        >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
        0.8
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) < 4 or len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        return None
    return round(float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]), 12)


def agreement(kappa: NDArray[np.float64], bits: NDArray[np.float64]) -> str:
    """Whether the layers with larger κ got more bits, in one sentence.

    Example:
        >>> agreement(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 2]))
        "Spearman's rank correlation of κ and bits over 4 layers: −0.95."
    """
    if len(kappa) < 4:
        return ""
    rank = rank_correlation(kappa, bits)
    if rank is None:
        return "Every layer has the same bits." if len(set(bits.tolist())) == 1 else "Every layer has the same κ."
    return f"Spearman's rank correlation of κ and bits over {len(kappa)} layers: {rank:+.2f}.".replace("-", "−")


def largest(values: Sequence[float], most: int) -> list[int]:
    """Places of the ``most`` largest values, in their order in the list; NaN counts as the smallest.

    Example:
        >>> largest([0.1, 5.0, float("nan"), 2.0], 2)
        [1, 3]
    """
    keys = np.nan_to_num(np.asarray(values, dtype=float), nan=-np.inf)
    return sorted(np.argsort(-keys, kind="stable")[:most].tolist())


def figure_text(value: float) -> str:
    """Four digits, with a real minus sign.

    Example:
        >>> figure_text(-0.000123456)
        '−0.0001235'
    """
    return f"{value:.4g}".replace("-", "−")
