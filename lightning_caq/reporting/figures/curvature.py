"""Curvature: κ of each layer, with the bits the layer was given."""

from __future__ import annotations

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.figures.scales import agreement, decades, numbers, tidy_log
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, sheet


@style.context("default")
def curvature_bars(report: QuantizationReport, profile: CurvatureProfile) -> Figure:
    """Bars of κ, one a layer on a logarithmic axis, under points that show the bits the layer was given.

    Args:
        report: The report of a run.
        profile: What was measured.

    Returns:
        The figure. Its axes come in pairs: a panel's bars (κ, out²/in²), then its points (bits).

    Raises:
        ValueError: If the report holds no layer.

    Example:
        >>> from lightning_caq.report import LayerRow, Size
        >>> from lightning_caq.profile import LayerCurvature
        >>> rows = (LayerRow("fc", "linear", 8, 8, 3.0, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "avg_bits=2", rows, {"quantized": Size(2.0, 4.0, 8)}, {})
        >>> figure = curvature_bars(report, CurvatureProfile((LayerCurvature("fc", 8, 2, 8, kappa=3.0),)))
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [3.0]
    """
    if not report.layers:
        raise ValueError("The report holds no layer.")
    measured = {row.name: row for row in profile.layers}
    found = [measured.get(row.name) for row in report.layers]
    kappa = numbers(row.kappa if row else None for row in found)
    tolerance = np.nan_to_num(numbers(row.kappa_tolerance if row else None for row in found), posinf=0.0)
    bits = numbers(row.bits.get("quantized") for row in report.layers)
    drawn = np.isfinite(kappa) & (kappa > 0)
    both = drawn & np.isfinite(bits)
    figure, panels = sheet(
        [row.name for row in report.layers],
        title="Curvature κ and bits of each layer",
        subtitle=f"{report.title('quantized')} at {report.budget}. κ says how sharply a layer's output energy bends "
        f"with its input; bits were not chosen by it. {agreement(kappa[both], bits[both])}",
        width=3.4,
        right=0.1,
        header=0.5,
        footer=0.85,
    )
    limits = decades(kappa[drawn])
    most = int(np.nanmax([4, *bits]))
    for axes, rows in panels:
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        tidy_log(axes.xaxis)
        _bars(axes, kappa[rows], tolerance[rows], drawn[rows])
        _points(axes, bits[rows], most)
    handles = [
        Patch(color=BAR, label="κ"),
        Line2D([], [], color=TOLERANCE, marker="|", label="tolerance of its iteration"),
        Line2D([], [], color=POINT, marker="o", markersize=8, linestyle="none", label="bits (upper axis)"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure


def _bars(axes: Axes, kappa: NDArray[np.float64], tolerance: NDArray[np.float64], drawn: NDArray[np.bool_]) -> None:
    """Bars of κ with their tolerance; where there is no bar, words say why."""
    place = np.arange(len(kappa))
    height = np.where(drawn, kappa, 0.0)
    axes.barh(place, height, height=0.74, color=BAR)
    axes.errorbar(
        height[drawn], place[drawn], xerr=(height * tolerance)[drawn], fmt="none", ecolor=TOLERANCE, capsize=2
    )
    for i in place[~drawn]:
        why = "κ is 0" if kappa[i] == 0 else "κ not measured"
        axes.text(0.015, i, why, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=FONT, color=GREY)
    axes.set_xlabel("κ (out²/in², logarithmic)", fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[["right", "top"]].set_visible(False)


def _points(axes: Axes, bits: NDArray[np.float64], most: int) -> None:
    """The bits as numbered points on an upper axis of their own, joined by a line from layer to layer."""
    upper = axes.twiny()
    place = np.arange(len(bits))
    upper.plot(bits, place, color=POINT, linewidth=0.8, alpha=0.4)
    upper.scatter(bits, place, s=75, color=POINT, linewidth=0)
    for i, b in enumerate(bits):
        if np.isfinite(b):
            upper.text(b, i, f"{b:.2g}", ha="center", va="center_baseline", fontsize=6.5, color="white")
    upper.set_xlim(0, most + 1)
    upper.set_xticks(range(1, most + 1))
    upper.tick_params(axis="x", labelsize=FONT, colors=POINT)
    upper.set_xlabel("bits a weight", fontsize=FONT, color=POINT)
    upper.spines["top"].set_color(POINT)
    upper.spines[["left", "right", "bottom"]].set_visible(False)
