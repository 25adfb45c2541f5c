"""Bits: a heat map of the bit-widths, layers as rows and networks as columns."""

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

from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.figures.scales import lines
from lightning_caq.reporting.metrics import headline_metric
from lightning_caq.reporting.sheet import FONT, GREY, LINE, inches, sheet, shorten


@style.context("default")
def bits_heatmap(report: QuantizationReport) -> Figure:
    """Heat map of bits: rows are layers, columns the quantized network and those it is compared with.

    Above each column stand its average bits, its ratio and the metric that is most like an accuracy.

    Args:
        report: The report of a run.

    Returns:
        The figure. The image array of each of its panels holds the bits themselves.

    Raises:
        ValueError: If the report holds no layer.

    Example:
        >>> from lightning_caq.report import LayerRow, Size
        >>> rows = (LayerRow("fc", "linear", 8, 8, None, None, {"quantized": 2}),)
        >>> report = QuantizationReport("cet", "avg_bits=2", rows, {"quantized": Size(2.0, 4.0, 8)}, {})
        >>> bits_heatmap(report).axes[0].images[0].get_array().tolist()
        [[2]]
    """
    if not report.layers:
        raise ValueError("The report holds no layer.")
    variants = [v for v in report.variants if v != "float"]
    bits = np.ma.masked_equal([[row.bits.get(v, 0) for v in variants] for row in report.layers], 0)
    # An average over channels has the colour of the nearest whole number.
    levels = sorted({int(side(b)) for b in bits.compressed() for side in (np.floor, np.ceil)})
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


def _header(report: QuantizationReport, variants: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The lines above the columns: what each line says, and its figure for each variant."""
    sizes = [report.sizes[v] for v in variants]
    lines = [
        ("average bits", [f"{size.avg_bits:.2f}" for size in sizes]),
        ("smaller than float32", [f"{size.ratio:.1f}x" for size in sizes]),
    ]
    metric = headline_metric(report.metric_names)
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
    *,
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
        axes.text(j, i, f"{b:.3g}" if b else "–", ha="center", va="center_baseline", fontsize=FONT, color=ink)
    rows, columns = bits.shape
    axes.set_xticks([])
    level = lines(-0.5, columns - 0.5, np.arange(rows - 1) + 0.5)
    upright = lines(-0.5, rows - 0.5, np.arange(columns - 1) + 0.5)[::-1]
    for x, y in (level, upright):
        axes.plot(x, y, color="white", linewidth=1.5, scalex=False, scaley=False)
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
