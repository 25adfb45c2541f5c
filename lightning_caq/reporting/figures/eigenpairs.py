"""Eigenpairs: how many of them the allocation needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lightning_caq.evaluation.sweep import mean_points
from lightning_caq.reporting.metrics import headline_metric, metric_label
from lightning_caq.reporting.palette import SERIES
from lightning_caq.reporting.sheet import FONT, board, shorten
from lightning_caq.studies import SweepPoint


@style.context("default")
def eigenpair_curve(points: Sequence[SweepPoint], floats: Mapping[str, float], metric: str | None = None) -> Figure:
    """A metric of the quantized network against the number of eigenpairs that bits were allocated by (CET figure 3).

    Args:
        points: Networks that differ in ``eigenpairs``, and perhaps in their seed.
        floats: Metrics of the float network.
        metric: The metric to draw; by default a loss, else what there is.

    Returns:
        The figure; its first line is the float network's if that is known, the curve is the last one.

    Raises:
        ValueError: If there is no point, or none has a finite value of the metric.

    Example:
        >>> points = [SweepPoint("cet", 3.0, 10.0, {"val_loss": 1 / k}, eigenpairs=k) for k in (50, 100)]
        >>> eigenpair_curve(points, {}).axes[0].lines[0].get_xydata().tolist()
        [[50.0, 0.02], [100.0, 0.01]]
    """
    if not points:
        raise ValueError("No other numbers of eigenpairs were tried; study=True does that.")
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    metric = metric or next((name for name in names if "loss" in name.lower()), headline_metric(names))
    drawn = sorted(
        (p for p in mean_points(points) if metric is not None and np.isfinite(p.metrics.get(metric, np.nan))),
        key=lambda p: p.eigenpairs,
    )
    if metric is None or not drawn:
        raise ValueError("No network has a finite value of a metric to draw; log one in validation, or give evaluate.")
    low, high = min(p.avg_bits for p in drawn), max(p.avg_bits for p in drawn)
    size = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    figure, (axes,) = board(
        [(0.85, 4.6)],
        tall=3.4,
        title="How many eigenpairs the allocation needs",
        subtitle=f"{drawn[0].method} at {size} bits a weight. A flat curve says that the first pairs told all there "
        "was to know. Error bars: standard error of the mean over seeds, where there are several.",
        right=0.3,
    )
    reference = floats.get(metric)
    if reference is not None and np.isfinite(reference):
        axes.axhline(reference, color="black", linewidth=1, linestyle=(0, (4, 3)), label=f"float, {reference:.4g}")
    counts = [p.eigenpairs for p in drawn]
    errors = [p.stderr.get(metric, 0.0) for p in drawn] if any(metric in p.stderr for p in drawn) else None
    axes.errorbar(counts, [p.metrics[metric] for p in drawn], yerr=errors, color=SERIES[0], marker="o", markersize=5.5,
                  linewidth=1.2, capsize=3, label="quantized")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.1)
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_xlabel("eigenpairs that span the short-axis subspace (logarithmic)", fontsize=FONT)
    axes.set_ylabel(metric_label(shorten(metric, 40)), fontsize=FONT, parse_math=False)
    axes.legend(fontsize=FONT, frameon=False)
    return figure
