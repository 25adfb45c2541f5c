"""The sheet that figures are drawn on: a title, and the layers as rows of one height in panels side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

FONT, TITLE_FONT = 8.0, 11.0
GREY = "#555555"
MARGIN, LINE = 0.2, 0.17  # inches, as are all lengths below
ROWS_PER_PANEL, MOST_PANELS = 36, 5

Panel = tuple[Axes, slice]


def sheet(
    names: Sequence[str],
    *,
    title: str,
    subtitle: str,
    width: float,
    right: float,
    header: float,
    labels: Sequence[str] = (),
    footer: float = MARGIN,
    extra: float = 0.0,
) -> tuple[Figure, list[Panel]]:
    """Make a titled figure with a panel for every so many layers; lengths are in inches.

    Args:
        names: The layers, one row each.
        title: What is seen.
        subtitle: How to read it.
        width: Width of a panel's axes; a lone narrow panel is widened to leave room for the title.
        right: Room right of each panel's axes.
        header: Room above the axes.
        labels: Other texts that must fit left of the axes.
        footer: Room below the axes.
        extra: Room right of the last panel.

    Returns:
        The figure, and for each panel its axes and the layers that are its rows.

    Example:
        >>> figure, panels = sheet(["a", "b"], title="T", subtitle="t", width=2, right=0, header=0.2)
        >>> [rows for _, rows in panels]
        [slice(0, 2, None)]
    """
    short = short_names(names)
    count = max(1, min(math.ceil(len(names) / ROWS_PER_PANEL), MOST_PANELS))
    rows = math.ceil(len(names) / count)
    row = float(np.clip(4 / max(rows, 1), 0.19, 0.34))
    left = MARGIN + max(inches(text) for text in ("", *short, *labels)) + 0.1
    if count == 1:
        width = max(width, 5.6 - left - right - extra - MARGIN)
    across = count * (left + width + right) + extra + MARGIN
    figure, above = _headed(across, header + rows * row + footer, title, subtitle)
    high = figure.get_figheight()
    panels: list[Panel] = []
    for p in range(count):
        mine = slice(p * rows, min((p + 1) * rows, len(names)))
        tall = row * (mine.stop - mine.start)
        x = (p * (left + width + right) + left) / across
        axes = figure.add_axes((x, (high - above - header - tall) / high, width / across, tall / high))
        axes.set_yticks(range(mine.stop - mine.start), short[mine], fontsize=FONT, parse_math=False)
        axes.set_ylim(mine.stop - mine.start - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        panels.append((axes, mine))
    return figure, panels


def board(
    frames: Sequence[tuple[float, float]], *, tall: float, title: str, subtitle: str, right: float = MARGIN,
    header: float = 0.1, footer: float = 0.55, rows: int = 1,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Make a titled figure with frames side by side, in one row or several; lengths are in inches.

    Args:
        frames: Of each frame the room left of its axes, and their width.
        tall: Height of the axes.
        title: What is seen.
        subtitle: How to read it.
        right: Room right of the last axes.
        header: Room above the axes of each row.
        footer: Room below the axes of each row.
        rows: Rows of frames.

    Returns:
        The figure, and the axes from left to right, row by row.

    Example:
        >>> figure, axes = board([(0.6, 3), (0.6, 2)], tall=2, title="T", subtitle="t")
        >>> len(axes), f"{figure.get_figwidth():.1f} in"
        (2, '6.4 in')
    """
    across = sum(left + width for left, width in frames) + right
    row = header + tall + footer
    figure, _ = _headed(across, rows * row, title, subtitle)
    high = figure.get_figheight()
    axes = []
    for below in reversed(range(rows)):
        x = 0.0
        for left, width in frames:
            bottom = (below * row + footer) / high
            axes.append(figure.add_axes(((x + left) / across, bottom, width / across, tall / high)))
            axes[-1].tick_params(labelsize=FONT)
            axes[-1].spines[["right", "top"]].set_visible(False)
            x += left + width
    return figure, axes


def _headed(across: float, below: float, title: str, subtitle: str) -> tuple[Figure, float]:
    """A figure with its title and subtitle, and the height that they take."""
    heading = textwrap.wrap(title, int((across - 2 * MARGIN) / inches("o", 1.2 * TITLE_FONT)))
    reading = textwrap.wrap(subtitle, int((across - 2 * MARGIN) / inches("o")))
    above = MARGIN + 0.22 * len(heading) + LINE * len(reading) + 0.1
    high = above + below
    figure = Figure(figsize=(across, high), dpi=120)
    FigureCanvasAgg(figure)
    x, y = MARGIN / across, (MARGIN + 0.22 * len(heading)) / high
    plain: dict[str, Any] = {"va": "top", "parse_math": False}
    figure.text(x, 1 - MARGIN / high, "\n".join(heading), fontsize=TITLE_FONT, weight="bold", **plain)
    figure.text(x, 1 - y, "\n".join(reading), fontsize=FONT, color=GREY, linespacing=1.4, **plain)
    return figure, above


def aside(axes: Axes, lines: Sequence[str], x: float = 0.15) -> None:
    """Write lines right of the axes, ``x`` inches away, from their top downwards."""
    for i, line in enumerate(lines):
        axes.annotate(line, (1, 1), (72 * x, -72 * LINE * (i + 0.5)), xycoords="axes fraction", va="center_baseline",
                      textcoords="offset points", fontsize=FONT, annotation_clip=False, parse_math=False)  # fmt: skip


def width_of(lines: Sequence[str]) -> float:
    """Room that ``aside`` and a legend of these lines need, in inches."""
    return max(map(inches, lines), default=0.0) + 0.15 + 3 * MARGIN


def legend_aside(axes: Axes, below: int = 0, **options: Any) -> None:
    """A legend right of the axes, at their top or ``below`` so many lines."""
    high = axes.bbox.height / axes.figure.dpi
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1 - LINE * below / high), fontsize=FONT, frameon=False,
                borderaxespad=0, borderpad=0.4, **options)  # fmt: skip


def inches(text: str, size: float = FONT) -> float:
    """Width of a text as it is drawn; of its longest line, if there are several.

    Example:
        >>> 0 < inches("layer") < inches("a longer layer") < 1
        True
    """
    font = FontProperties(size=size)
    widths = (text_to_path.get_text_width_height_descent(x, font, ismath=False)[0] for x in text.splitlines())
    return float(max(widths, default=0.0)) / 72


def shorten(name: str, limit: int) -> str:
    """A long name without its middle; more is kept of its end, which says which layer it is.

    Example:
        >>> shorten("encoder.layers.11.attention.out_proj", 20)
        'encode…tion.out_proj'
        >>> shorten("fc", 20)
        'fc'
    """
    if len(name) <= limit:
        return name
    head = (limit - 1) // 3
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


def short_names(names: Sequence[str], limit: int = 30) -> list[str]:
    """Names of about ``limit`` characters that are still told apart: longer, or numbered, where they must be.

    Example:
        >>> short_names(["stem." + "x" * 40, "head"], 12)
        ['ste…xxxxxxxx', 'head']
    """
    for length in range(limit, 2 * limit, 4):
        short = [shorten(name, length) for name in names]
        if len(set(short)) == len(names):
            return short
    return [f"{i}: {shorten(name, limit)}" for i, name in enumerate(names)]
