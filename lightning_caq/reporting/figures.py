"""Figures: plain data in, a matplotlib ``Figure`` out, drawn without pyplot's global state.

Layers are rows in every figure, in order of execution; many layers are laid out in several panels side by side.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy.stats import rankdata

from lightning_caq.evaluation.report import QuantizationReport
from lightning_caq.measures.profile import CurvatureProfile
from lightning_caq.reporting.sheet import FONT, GREY, LINE, inches, sheet, shorten

# Light bars under dark points: apart in lightness as well as in hue, so that no kind of colour blindness merges them.
BAR, TOLERANCE, POINT = "#9ec5e8", "#1f4e79", "#b34700"


@style.context("default")
def bits_heatmap(report: QuantizationReport) -> Figure:
    """Heat map of bits: rows are layers, columns the quantized network and those it is compared with.

    Above each column stand its average bits, its ratio and the metric that is most like an accuracy.

    Args:
        report: The report of a run.

    Returns:
        The figure. The image array of each of its panels holds the bits themselves.

    Example:
        >>> from lightning_caq.evaluation.report import LayerRow, Size
        >>> rows = (LayerRow("fc", "linear", 8, 8, None, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "avg_bits=2", rows, {"quantized": Size(2.0, 4.0, 8)}, {})
        >>> bits_heatmap(report).axes[0].images[0].get_array().tolist()
        [[2]]
    """
    variants = [v for v in report.variants if v != "float"]
    bits = np.ma.masked_equal([[row.bits.get(v, 0) for v in variants] for row in report.layers], 0)
    levels = sorted({int(b) for b in bits.compressed()})
    counts = ["weights", *(f"{row.weights:,}" for row in report.layers)]
    titles = [textwrap.fill(report.title(v), 14) for v in variants]
    header = _header(report, variants)
    column = 0.25 + max(0.5, *(inches(text) for text in (*titles, *(f for _, line in header for f in line))))
    weights = 0.15 + max(map(inches, counts))
    figure, panels = sheet(
        [row.name for row in report.layers],
        title="Bits given to the weights of each layer",
        subtitle=f"{report.title('quantized')} at {report.budget}. Layers in order of execution, downwards; "
        "the darker, the more bits a weight has.",
        width=column * len(variants),
        right=weights,
        header=0.1 + LINE * (len(header) + 1 + max(title.count("\n") for title in titles)),
        labels=[name for name, _ in header],
        extra=0.85,
    )
    colours = _colours(levels)
    for axes, rows in panels:
        _cells(axes, bits[rows], colours)
        for i, count in enumerate(counts[1:][rows]):
            axes.annotate(count, (1, i), (72 * weights, 0), xycoords=axes.get_yaxis_transform(), ha="right",
                          va="center_baseline", textcoords="offset points", fontsize=FONT, color=GREY)  # fmt: skip
        for line, (name, values) in enumerate([*reversed(header), ("", titles)]):
            _above(axes, 0, line, name, ha="right", dx=-3.5, color=GREY)
            for j, value in enumerate(values):
                _above(axes, (j + 0.5) / len(variants), line, value, bold=values is titles)
        _above(axes, 1, len(header), "weights", ha="right", dx=72 * weights, color=GREY)
    _colour_bar(figure, panels[0][0], colours, levels)
    return figure


@style.context("default")
def curvature_bars(report: QuantizationReport, profile: CurvatureProfile) -> Figure:
    """Bars of κ, one a layer on a logarithmic axis, under points that show the bits the layer was given.

    Args:
        report: The report of a run.
        profile: What was measured.

    Returns:
        The figure. Its axes come in pairs: a panel's bars (κ, out²/in²), then its points (bits).

    Example:
        >>> from lightning_caq.evaluation.report import LayerRow, Size
        >>> from lightning_caq.measures.profile import LayerCurvature
        >>> rows = (LayerRow("fc", "linear", 8, 8, 3.0, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "avg_bits=2", rows, {"quantized": Size(2.0, 4.0, 8)}, {})
        >>> figure = curvature_bars(report, CurvatureProfile((LayerCurvature("fc", 8, 2, 8, kappa=3.0),)))
        >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
        [3.0]
    """
    measured = {row.name: row for row in profile.layers}
    found = [measured.get(row.name) for row in report.layers]
    kappa = np.array([_number(row.kappa if row else None) for row in found])
    tolerance = np.nan_to_num(np.array([_number(row.kappa_tolerance if row else None) for row in found]), posinf=0.0)
    bits = np.array([_number(row.bits.get("quantized")) for row in report.layers])
    drawn = np.isfinite(kappa) & (kappa > 0)
    both = drawn & np.isfinite(bits)
    figure, panels = sheet(
        [row.name for row in report.layers],
        title="Curvature κ and bits of each layer",
        subtitle=f"{report.title('quantized')} at {report.budget}. κ says how sharply a layer's output energy bends "
        f"with its input; it is one of several measures. {_agreement(kappa[both], bits[both])}",
        width=3.4,
        right=0.1,
        header=0.5,
        footer=0.85,
    )
    limits = _decades(kappa[drawn])
    most = int(np.nanmax([4, *bits]))
    for axes, rows in panels:
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        _bars(axes, kappa[rows], tolerance[rows], drawn[rows])
        _points(axes, bits[rows], most)
    handles = [
        Patch(color=BAR, label="κ"),
        Line2D([], [], color=TOLERANCE, marker="|", label="tolerance of its iteration"),
        Line2D([], [], color=POINT, marker="o", markersize=8, linestyle="none", label="bits (upper axis)"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure


def headline_metric(report: QuantizationReport) -> str | None:
    """The metric to show where there is room for one: an accuracy, else another of the user's, else the objective.

    Example:
        >>> report = QuantizationReport("cet", "", (), {}, {"float/val_loss": 0.3, "float/val_acc": 0.9})
        >>> headline_metric(report)
        'val_acc'
    """
    return min(
        report.metric_names, key=lambda name: ("acc" not in name.lower(), name in ("distill", "task")), default=None
    )


def _header(report: QuantizationReport, variants: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The lines above the columns: what each line says, and its figure for each variant."""
    sizes = [report.sizes[v] for v in variants]
    lines = [
        ("average bits", [f"{size.avg_bits:.2f}" for size in sizes]),
        ("smaller than float32", [f"{size.ratio:.1f}x" for size in sizes]),
    ]
    metric = headline_metric(report)
    if metric is not None:
        values = [report.metrics.get(f"{v}/{metric}") for v in ("float", *variants)]
        first, *rest = ["–" if value is None else f"{value:.4g}" for value in values]
        lines.append((f"{shorten(metric, 24)} (float {first})", rest))
    return lines


def _above(
    axes: Axes,
    x: float,
    line: int,
    text: str,
    ha: str = "center",
    dx: float = 0.0,
    color: str = "black",
    bold: bool = False,
) -> None:
    """Write ``text`` above the axes, ``line`` lines up, at the fraction ``x`` of their width, ``dx`` points aside."""
    axes.annotate(
        text,
        (x, 1),
        (dx, 72 * (0.05 + LINE * line)),
        xycoords="axes fraction",
        textcoords="offset points",
        ha=ha,
        va="bottom",
        fontsize=FONT,
        color=color,
        weight="bold" if bold else "normal",
        parse_math=False,
    )


def _colours(levels: Sequence[int]) -> tuple[Colormap, BoundaryNorm]:
    """A colour a bit-width, always the same one for the same bits; neighbouring levels meet half-way."""
    ramp = mpl.colormaps["YlGnBu"]
    cmap = ListedColormap([ramp(0.1 + 0.85 * (min(b, 9) - 1) / 8) for b in levels])
    edges = [levels[0] - 0.5, *((a + b) / 2 for a, b in pairwise(levels)), levels[-1] + 0.5]
    return cmap.with_extremes(bad="#eeeeee"), BoundaryNorm(edges, len(levels))


def _ink(rgba: Sequence[float]) -> str:
    """Black or white, whichever is read more easily on the colour (relative luminance of sRGB)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


def _cells(axes: Axes, bits: np.ma.MaskedArray, colours: tuple[Colormap, BoundaryNorm]) -> None:
    """Draw the map: coloured cells with white lines between them, and the bits in each."""
    cmap, norm = colours
    axes.imshow(bits, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    for (i, j), b in np.ndenumerate(bits.filled(0)):
        ink = _ink(cmap(norm(b))) if b else GREY
        axes.text(j, i, str(b or "–"), ha="center", va="center_baseline", fontsize=FONT, color=ink)
    rows, columns = bits.shape
    axes.set_xticks([])
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)


def _colour_bar(figure: Figure, axes: Axes, colours: tuple[Colormap, BoundaryNorm], levels: Sequence[int]) -> None:
    """The colours and their bits, at the right edge and level with the top of the first panel."""
    cmap, norm = colours
    edges = norm.boundaries
    across, high = figure.get_size_inches()
    box = axes.get_position()
    tall = min(box.height, 0.3 * len(levels) / high)
    bar = figure.colorbar(
        ScalarMappable(norm, cmap), cax=figure.add_axes((1 - 0.55 / across, box.y1 - tall, 0.18 / across, tall))
    )
    # Each colour takes the same length, whatever the distance to the next level: its middle is where its label goes.
    bar.set_ticks((edges[:-1] + edges[1:]) / 2, labels=[str(b) for b in levels], fontsize=FONT)
    bar.ax.tick_params(which="both", length=0)
    bar.outline.set_visible(False)
    _above(bar.ax, 0.5, 0, "bits", color=GREY)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


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
            upper.text(b, i, f"{b:.0f}", ha="center", va="center_baseline", fontsize=6.5, color="white")
    upper.set_xlim(0, most + 1)
    upper.set_xticks(range(1, most + 1))
    upper.tick_params(axis="x", labelsize=FONT, colors=POINT)
    upper.set_xlabel("bits a weight", fontsize=FONT, color=POINT)
    upper.spines["top"].set_color(POINT)
    upper.spines[["left", "right", "bottom"]].set_visible(False)


def _decades(values: NDArray[np.float64]) -> tuple[float, float]:
    """Whole decades that hold the values, with room for the smallest to be seen as a bar."""
    if not len(values):
        return 0.1, 10.0
    low, high = np.log10(values.min()) - 0.2, np.log10(values.max())
    return float(10 ** np.floor(low)), float(10 ** max(np.ceil(high), np.floor(low) + 1))


def _agreement(kappa: NDArray[np.float64], bits: NDArray[np.float64]) -> str:
    """Whether the layers with larger κ got more bits, in one sentence."""
    if len(kappa) < 4:
        return ""
    if len(set(kappa)) == 1 or len(set(bits)) == 1:
        return "Every layer has the same bits." if len(set(bits)) == 1 else "Every layer has the same κ."
    rank = float(np.corrcoef(rankdata(kappa), rankdata(bits))[0, 1])
    return f"Spearman's rank correlation of κ and bits over {len(kappa)} layers: {rank:+.2f}.".replace("-", "−")
