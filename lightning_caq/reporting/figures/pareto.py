"""Pareto: what a network is worth against the bits that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_caq.evaluation.sweep import mean_points
from lightning_caq.reporting.metrics import headline_metric, metric_label
from lightning_caq.reporting.palette import POINT, series_style
from lightning_caq.reporting.sheet import FONT, board, legend_aside, shorten, width_of
from lightning_caq.studies import SweepPoint

_APART = 0.5  # bits; networks closer together than this are of one size


@style.context("default")
def pareto(points: Sequence[SweepPoint], floats: Mapping[str, float], metric: str | None = None) -> Figure:
    """A metric against average bits: a curve a method, error bars over seeds, the float network as a line.

    Args:
        points: Quantized networks; those that differ in their seed only are drawn as their mean.
        floats: Metrics of the float network.
        metric: The metric to draw; by default the one that is most like an accuracy.

    Returns:
        The figure. Its lines hold the points; the float network is a horizontal line.

    Raises:
        ValueError: If no point has a finite value of the metric.

    Example:
        >>> points = [SweepPoint("cet", bits, 32 / bits, {"acc": acc}) for bits, acc in ((3.0, 0.9), (2.0, 0.8))]
        >>> pareto(points, {"acc": 0.92}).axes[0].lines[1].get_xydata().tolist()
        [[2.0, 0.8], [3.0, 0.9]]
    """
    metric = metric or headline_metric(list(dict.fromkeys(name for point in points for name in point.metrics)))
    drawn = [p for p in mean_points(points) if metric is not None and np.isfinite(p.metrics.get(metric, np.nan))]
    if metric is None or not drawn:
        raise ValueError("No network has a finite value of a metric to draw; log one in validation, or give evaluate.")
    methods = list(dict.fromkeys(point.method for point in drawn))
    labels = [shorten(method, 40) for method in methods]
    figure, (axes,) = board(
        [(0.85, 4.6)],
        tall=3.4,
        title=f"{shorten(metric, 60)} against size",
        subtitle="One point a network, one curve a method. Error bars: standard error of the mean over seeds, where "
        "there are several. The ring marks the network that the plan is for.",
        right=width_of([*labels, "the plan's network"]),
    )
    bits = [p.avg_bits for p in drawn]
    together = max(bits) - min(bits) < _APART
    reference = floats.get(metric)
    if reference is not None and np.isfinite(reference):
        axes.axhline(reference, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"float, {reference:.4g}")
    for i, (method, label) in enumerate(zip(methods, labels, strict=True)):
        # Points of one size may hide each other: those drawn first are larger.
        size = 5.5 + (6 * (1 - (i + 1) / len(methods)) if together else 0.0)
        _curve(axes, [p for p in drawn if p.method == method], metric, label, i, size)
    for point in (p for p in drawn if p.chosen):
        axes.plot([point.avg_bits], [point.metrics[metric]], "o", markersize=13, fillstyle="none", color=POINT)
    if any(p.chosen for p in drawn):
        ring = Line2D([], [], marker="o", markersize=10, fillstyle="none", color=POINT, linestyle="none")
        handles, names = axes.get_legend_handles_labels()
        legend_aside(axes, handles=[*handles, ring], labels=[*names, "the plan's network"])
    else:
        legend_aside(axes)
    axes.margins(0.12)
    if together:  # differences of a few thousandths of a bit must not look like differences in size
        axes.set_xlim(min(bits) - _APART, max(bits) + _APART)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_xlabel("average bits a weight (scales not counted)", fontsize=FONT)
    axes.set_ylabel(metric_label(metric), fontsize=FONT, parse_math=False)
    return figure


def _curve(axes: Axes, points: Sequence[SweepPoint], metric: str, label: str, index: int, size: float) -> None:
    colour, marker = series_style(index)
    points = sorted(points, key=lambda p: p.avg_bits)
    axes.errorbar(
        [p.avg_bits for p in points],
        [p.metrics[metric] for p in points],
        yerr=[p.stderr.get(metric, 0.0) for p in points] if any(metric in p.stderr for p in points) else None,
        color=colour,
        marker=marker,
        markersize=size,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.2,
        capsize=3,
        label=label,
    )
