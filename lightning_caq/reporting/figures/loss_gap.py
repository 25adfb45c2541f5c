"""Loss gap: the loss change that was measured, against what the quadratic model says, and how far the model holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lightning_caq.evaluation.loss_gap import LossGap
from lightning_caq.measures.hessian.validity import tolerated_gap
from lightning_caq.reporting.figures.scales import largest, numbers, tidy_log
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, board, inches, short_names

SHOWN = 30
_NOISE = 1e-4  # nat; within it the axes are linear, so that zero and negative changes have a place


@style.context("default")
def loss_gap(gaps: Sequence[LossGap]) -> Figure:
    """Left: measured against predicted loss change, a point a layer and bit-width. Right: how far the model holds.

    On the right, each layer's rounding errors ‖Δ‖ are numbered with their bits; the bar ends at the validity radius,
    the largest error at which the model was seen to hold. The 30 layers with the largest gaps have a row.

    Args:
        gaps: The layers and bit-widths.

    Returns:
        The figure. On the left the first collection holds the points inside the model's range (predicted, measured),
        the second those outside it.

    Raises:
        ValueError: If no loss change was measured.

    Example:
        >>> figure = loss_gap([LossGap("fc", 2, 2.0, 0.5, 0.75, True), LossGap("fc", 3, 1.0, 0.1, 0.11, False)])
        >>> figure.axes[0].collections[0].get_offsets().tolist()
        [[0.1, 0.11]]
    """
    compared = [g for g in gaps if g.gap is not None and np.isfinite(g.gap)]
    if not compared:
        raise ValueError("No loss change was measured; method='cet' or study=True does that.")
    layers = list(dict.fromkeys(g.name for g in gaps))
    worst = {name: max((g.gap or 0.0 for g in compared if g.name == name), default=0.0) for name in layers}
    shown = [layers[i] for i in largest([worst[name] for name in layers], SHOWN)]
    names = short_names(shown)
    rule = "" if len(shown) == len(layers) else f" the {len(shown)} of {len(layers)} layers with the largest gaps;"
    outside = sum(g.outside for g in compared)
    figure, (scatter, rows) = board(
        [(0.8, 3.2), (0.35 + max(map(inches, names)), 3.2)],
        tall=max(3.2, 0.19 * len(shown)),
        title="How far the quadratic model of the loss holds",
        subtitle=f"One layer rounded at a time. {outside} of {len(compared)} measured changes are outside the model's "
        "range, the grey band: there the measured change is used instead. Right:"
        f"{rule} bars end at the validity radius; where it lies, and below, the model is taken to hold.",
        right=0.35,
        footer=0.85,
    )
    _compare(scatter, compared)
    _radii(rows, [[g for g in gaps if g.name == name] for name in shown], names)
    handles = [
        Line2D([], [], color=TOLERANCE, marker="o", markersize=5, linestyle="none", label="inside the model's range"),
        Line2D([], [], color=POINT, marker="X", markersize=6, linestyle="none", label="outside it"),
        Line2D([], [], color=BAR, linewidth=7, label="up to the validity radius"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure


def _compare(axes: Axes, gaps: Sequence[LossGap]) -> None:
    """Points around the diagonal, and the band in which a prediction counts as right."""
    for chosen, colour, marker, size in ((False, TOLERANCE, "o", 22), (True, POINT, "X", 34)):
        part = [g for g in gaps if g.outside is chosen]
        predicted, actual = numbers(g.predicted for g in part), numbers(g.actual for g in part)
        axes.scatter(
            predicted, actual, s=size, marker=marker, color=colour, edgecolors="white", linewidths=0.4, zorder=3
        )
    values = [v for g in gaps for v in (g.predicted, g.actual) if v is not None]
    high = 2 * max(map(abs, values), default=1.0) or 1.0
    low = -high if min(values) < -high / 100 else min(0.0, 3 * min(values)) - _NOISE
    actual = np.sort(
        np.concatenate([np.geomspace(_NOISE / 10, high, 200), [0.0], -np.geomspace(_NOISE / 10, high, 200)])
    )
    band = np.array([tolerated_gap(y) for y in actual])
    axes.fill_betweenx(actual, actual - band, actual + band, color="#eeeeee", linewidth=0, zorder=0)
    axes.plot(actual, actual, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xscale("symlog", linthresh=_NOISE)
    axes.set_yscale("symlog", linthresh=_NOISE)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(_ticks(low, high))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("predicted loss change, gᵀΔ + ½ ΔᵀHΔ (nat)", fontsize=FONT)
    axes.set_ylabel("measured loss change (nat)", fontsize=FONT)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Zero and decades of both signs within the limits, as many as can be told apart."""
    decades = [10.0**k for k in range(int(np.log10(_NOISE)), int(np.floor(np.log10(high))) + 1)]
    signed = [-d for d in decades if -d >= low]
    apart = max(1, -(-(len(decades) + len(signed)) // most))
    return [*signed[::-1][len(signed) % apart :: apart], 0.0, *decades[::-1][::apart][::-1]]


def _radii(axes: Axes, layers: Sequence[Sequence[LossGap]], names: Sequence[str]) -> None:
    """One row a layer: its errors by bit-width, and a bar up to the largest one at which the model held."""
    distances = [g.distance for gaps in layers for g in gaps if g.distance > 0]
    low, high = (min(distances) / 1.5, max(distances) * 1.5) if distances else (0.1, 10.0)
    for i, gaps in enumerate(layers):
        held = [g.distance for g in gaps if g.actual is not None and not g.outside]
        if held and max(held) > 0:
            axes.barh([i], [max(held) - low], left=low, height=0.62, color=BAR)
        for g in gaps:
            if g.distance > 0:
                ink, weight = (POINT, "bold") if g.outside else (TOLERANCE, "normal")
                axes.text(g.distance, i, str(g.bits), fontsize=FONT, color=ink, weight=weight, ha="center",
                          va="center_baseline")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    tidy_log(axes.xaxis)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks(range(len(layers)), names, fontsize=FONT, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("‖Δ‖ at each bit-width (unit of the weights)", fontsize=FONT)
