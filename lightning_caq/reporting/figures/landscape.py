"""Landscape: the loss on the plane of a short and a long axis, with the path that rounding takes on it."""

from __future__ import annotations

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_caq.reporting.figures.scales import figure_text
from lightning_caq.reporting.palette import POINT
from lightning_caq.reporting.sheet import FONT, board
from lightning_caq.studies import Landscape

LEVELS = 13


@style.context("default")
def loss_landscape(found: Landscape) -> Figure:
    """Contours of the loss change, and the weights' way from the float network to the rounded one.

    Contours are as far apart as those of a quadratic bowl would be if they were evenly spaced in weights. The axes have
    scales of their own: the short axis is drawn far longer than it is.

    Args:
        found: The landscape.

    Returns:
        The figure. The line on its first axes is the path.

    Raises:
        ValueError: If no loss on the grid is finite.

    Example:
        >>> axis = (-1.0, 0.0, 1.0)
        >>> bowl = tuple(tuple(4 * s * s + t * t for s in axis) for t in axis)
        >>> figure = loss_landscape(Landscape(axis, axis, bowl, (8.0, 2.0), ((0.0, 0.0), (0.5, 0.5))))
        >>> figure.axes[0].lines[0].get_xydata().tolist()
        [[0.0, 0.0], [0.5, 0.5]]
    """
    loss = np.ma.masked_invalid(found.loss)
    if not loss.count():
        raise ValueError("No loss on the grid is finite.")
    steep, flat = found.curvatures
    figure, (axes, bar) = board(
        [(0.75, 4.2), (0.25, 0.18)],
        tall=3.6,
        title="The loss around the float network",
        subtitle=f"Curvature along the short axis {figure_text(steep)} nat/weight², along the long axis "
        f"{figure_text(flat)} nat/weight². The path rounds one layer after the other, projected on this plane; "
        f"{found.off_plane:.0%} of the whole rounding error's length lies outside it. The axes have scales of "
        "their own.",
        right=0.75,
        footer=0.85,
    )
    low, high = float(loss.min()), float(loss.max())
    levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** 2 if high > low else np.array([low - 0.5, low + 0.5])
    drawn = axes.contourf(found.short, found.long, loss, levels=levels, cmap="YlGnBu")
    axes.contour(found.short, found.long, loss, levels=levels, colors="white", linewidths=0.5)
    _path(axes, found)
    figure.colorbar(drawn, cax=bar, ticks=levels[::3], format=lambda x, _: _tick(x, high - low))
    bar.tick_params(labelsize=FONT)
    bar.set_title("nat", fontsize=FONT)
    axes.set_xlabel("along the short axis (unit of the weights)", fontsize=FONT)
    axes.set_ylabel("along the long axis (unit of the weights)", fontsize=FONT)
    handles = [
        Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="none", label="float network"),
        Line2D([], [], color=POINT, marker=".", label="a layer more rounded"),
        Line2D([], [], color=POINT, marker="s", linestyle="none", label="all layers rounded"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure


def _path(axes: Axes, found: Landscape) -> None:
    places = np.array(found.path)
    axes.plot(places[:, 0], places[:, 1], color=POINT, linewidth=1.2, marker=".", markersize=5)
    axes.plot(*places[0], color="black", marker="o", markerfacecolor="white", markersize=7)
    axes.plot(*places[-1], color=POINT, marker="s", markersize=7)


def _tick(value: float, span: float) -> str:
    """Two digits, and zero for what is zero but for noise."""
    return figure_text(float(f"{value:.2g}")) if abs(value) > 1e-3 * span else "0"
