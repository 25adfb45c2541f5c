"""κ against bits: whether the layers that bend most sharply got the most bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.figures.scales import agreement, decades, numbers, tidy_log
from lightning_caq.reporting.palette import BAR, TOLERANCE
from lightning_caq.reporting.sheet import FONT, aside, board, inches, short_names

NAMED = 14
_WIDE, _TALL, _POINT = 4.6, 3.8, 0.135  # inches: the axes, and from one point to the next


@style.context("default")
def kappa_vs_bits(report: QuantizationReport, profile: CurvatureProfile) -> Figure:
    """Bits against κ, one point a layer, with Spearman's rank correlation.

    The layers whose rank in bits differs most from their rank in κ are numbered and named, 14 at most, and none that
    would hide another one's number.

    Args:
        report: The report of a run.
        profile: What was measured.

    Returns:
        The figure. Its first collection holds the points (κ in out²/in², bits; moved apart where they would overlap).

    Raises:
        ValueError: If no layer has a positive κ.

    Example:
        >>> from lightning_caq.report import LayerRow
        >>> from lightning_caq.profile import LayerCurvature
        >>> rows = (LayerRow("fc", "linear", 8, 8, 3.0, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "", rows, {}, {})
        >>> figure = kappa_vs_bits(report, CurvatureProfile((LayerCurvature("fc", 8, 2, 8, kappa=3.0),)))
        >>> figure.axes[0].collections[0].get_offsets().tolist()
        [[3.0, 2.0]]
    """
    known = {row.name: row.kappa for row in profile.layers}
    kappa = numbers(known.get(row.name) for row in report.layers)
    bits = numbers(row.bits.get("quantized") for row in report.layers)
    drawn = np.flatnonzero(np.isfinite(kappa) & (kappa > 0) & np.isfinite(bits))
    if not len(drawn):
        raise ValueError("No layer has a positive κ and bits; measure with 'kappa' among needs.")
    names = short_names([row.name for row in report.layers])
    kappa, bits = kappa[drawn], bits[drawn]
    limits = tuple(np.array(decades(kappa)) * (0.8, 1.25))
    order = np.argsort(-np.abs(rankdata(kappa) - rankdata(bits)), kind="stable").tolist()
    place, free = _apart(np.log10(kappa), bits, order, float(np.diff(np.log10(limits))[0]))
    named = sorted([i for i in order if free[i]][:NAMED])
    left_out = len(report.layers) - len(drawn)
    key = [f"{n}  {names[drawn[i]]}" for n, i in enumerate(named, 1)]
    heading = "all layers" if len(named) == len(drawn) else f"the {len(named)} most out of rank"
    said = [
        agreement(kappa, bits),
        "κ is one of several measures; where bits come from others too, no perfect agreement is to be expected.",
        f"{left_out} layers without a positive κ are left out." if left_out else "",
    ]
    figure, (axes,) = board(
        [(0.65, _WIDE)],
        tall=_TALL,
        title="Do the layers with larger κ get more bits?",
        subtitle=" ".join(filter(None, said)),
        right=max(map(inches, [*key, heading])) + 0.35,
    )
    _points(axes, kappa, place, named)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    tidy_log(axes.xaxis)
    axes.set_ylim(min(bits) - 0.7, max(bits) + 0.7)
    axes.set_yticks(sorted(set(bits)), [f"{b:.3g}" for b in sorted(set(bits))])
    axes.set_xlabel("κ (out²/in², logarithmic)", fontsize=FONT)
    axes.set_ylabel("bits a weight", fontsize=FONT)
    aside(axes, [heading, *key])
    return figure


def _points(axes: Axes, kappa: NDArray[np.float64], place: NDArray[np.float64], named: list[int]) -> None:
    """Pale points for all layers, and dark numbered ones over those that are named."""
    axes.scatter(kappa, place, s=60, color=BAR, edgecolors="white", linewidths=0.6)
    axes.scatter(kappa[named], place[named], s=85, color=TOLERANCE, edgecolors="white", linewidths=0.6)
    for number, i in enumerate(named, 1):
        axes.text(kappa[i], place[i], str(number), ha="center", va="center_baseline", fontsize=6, color="white")


def _apart(
    x: NDArray[np.float64], bits: NDArray[np.float64], order: Sequence[int], span: float
) -> tuple[NDArray[np.float64], list[bool]]:
    """Heights of the points, and which of them hide no other.

    A height is the bits of a point, moved up or down a little where a point that comes before it in ``order`` is too
    close; where no place is left, the point stays.
    """
    step = _POINT / _TALL * (bits.max() - bits.min() + 1.4)
    slots = (0.0, *(sign * step * k for k in range(1, int(0.45 / step) + 1) for sign in (1, -1)))
    place, free = bits.copy(), [True] * len(bits)
    taken: list[int] = []
    for i in order:
        near = [place[j] - bits[j] for j in taken if bits[j] == bits[i] and abs(x[j] - x[i]) < _POINT / _WIDE * span]
        slot = next((s for s in slots if all(abs(s - other) > step / 2 for other in near)), None)
        free[i] = slot is not None
        place[i] += slot or 0.0
        taken.append(i)
    return place, free
