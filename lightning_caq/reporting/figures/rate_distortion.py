"""Rate and distortion: the output error against bits a weight, Shannon's lower bound, and the bits of every layer."""

from __future__ import annotations

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_caq.reporting.figures.scales import largest, tidy_log
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, board, inches, short_names
from lightning_caq.studies import RateLimit, RatePoint

SHOWN = 30
_BEYOND = 2.0  # how many times the largest error, and the smallest, the bound is drawn to


@style.context("default")
def rate_distortion(limit: RateLimit | None) -> Figure:
    """Left: output error against bits a weight, and the bound. Right: the bits of each layer, and its own bound.

    The bound on the left is taken at the errors that layers have in the network that was kept, all in proportion; its
    output error stands for 1.

    Args:
        limit: Bits of entropy-coded layers, their bounds and the networks that were tried.

    Returns:
        The figure. On the left the first line is the bound, (bits, error), the second the networks that were tried.

    Raises:
        ValueError: If layers have fixed widths, or the errors of networks are not known.

    Example:
        >>> from lightning_caq.studies import LayerRate
        >>> rows = (LayerRate("fc", 100, bits=2.0, limit=1.75, distortion=0.1),)
        >>> figure = rate_distortion(RateLimit(rows, (RatePoint(2.0, 0.1), RatePoint(3.0, 0.05))))
        >>> figure.axes[0].lines[1].get_xydata().tolist()
        [[2.0, 0.1], [3.0, 0.05]]
    """
    if limit is None:
        raise ValueError("Layers have fixed widths; use coding='entropy' for codes that come near the limit.")
    tried = [point for point in limit.tried if point.output_error > 0]
    if not tried:
        raise ValueError("The output errors of entropy-coded networks are not known.")
    kept = min(tried, key=lambda point: abs(point.bits - limit.bits))
    shown = [limit.layers[i] for i in sorted(largest([float(x.weights) for x in limit.layers], SHOWN))]
    names = short_names([x.name for x in shown])
    rule = "" if len(shown) == len(limit.layers) else f", the {len(shown)} largest of {len(limit.layers)} layers"
    figure, (curve, rows) = board(
        [(0.8, 3.4), (0.35 + max(map(inches, names)), 3.0)],
        tall=max(3.2, 0.19 * len(shown)),
        title="Bits, error, and the limit",
        subtitle=f"Codes take {limit.bits:.2f} bits a weight; no code of weights with these densities takes fewer than "
        f"{limit.limit:.2f} at this error (Shannon's lower bound). Right: the same for each layer{rule}.",
        right=0.35,
        footer=0.85,
    )
    _curves(curve, limit, tried, kept)
    places = np.arange(len(shown))
    rows.barh(places, [x.bits for x in shown], height=0.62, color=BAR)
    rows.plot([x.limit for x in shown], places, "|", markersize=9, markeredgewidth=2, color=TOLERANCE)
    rows.set_ylim(len(shown) - 0.5, -0.5)
    rows.set_yticks(places, names, fontsize=FONT, parse_math=False)
    rows.tick_params(axis="y", length=0)
    rows.set_xlabel("bits a weight", fontsize=FONT)
    handles = [
        Line2D([], [], color=GREY, linewidth=1.2, label="the limit, all errors in proportion"),
        Line2D([], [], color=TOLERANCE, marker="o", markersize=5, label="networks that were tried"),
        Line2D(
            [], [], marker="o", markersize=10, fillstyle="none", color=POINT, linestyle="none", label="the kept one"
        ),
        Line2D([], [], color=BAR, linewidth=7, label="bits of a layer"),
        Line2D([], [], color=TOLERANCE, marker="|", markeredgewidth=2, linestyle="none", label="its limit"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=0.6)
    return figure


def _curves(axes: Axes, limit: RateLimit, tried: list[RatePoint], kept: RatePoint) -> None:
    errors = [point.output_error for point in tried]
    drawn = np.geomspace(min(errors) / _BEYOND, max(errors) * _BEYOND, 100)
    bound = [limit.limit_at(float(error / kept.output_error) ** 2) for error in drawn]
    axes.plot(bound, drawn, color=GREY, linewidth=1.2)
    axes.plot([point.bits for point in tried], errors, color=TOLERANCE, marker="o", markersize=5, linewidth=1.0)
    axes.plot([kept.bits], [kept.output_error], "o", markersize=12, fillstyle="none", color=POINT)
    axes.set_yscale("log")
    tidy_log(axes.yaxis)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_xlabel("bits a weight", fontsize=FONT)
    axes.set_ylabel("output error, a part of the output", fontsize=FONT)
