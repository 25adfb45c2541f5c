"""Training: κ, L, trace and top eigenvalue of every layer over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_caq.reporting.figures.scales import numbers, tidy_log
from lightning_caq.reporting.palette import series_style
from lightning_caq.reporting.sheet import FONT, GREY, board, inches, legend_aside, short_names, width_of
from lightning_caq.studies import EpochCurvature

NAMED = 8
_PANELS = {
    "kappa": "κ (out²/in²)",
    "lipschitz": "L (out/in)",
    "trace": "trace (nat/weight²)",
    "top_eigenvalue": "top eigenvalue (nat/weight²)",
}


@style.context("default")
def training_curves(epochs: Sequence[EpochCurvature]) -> Figure:
    """Curves over the epochs, a panel a measure and a line a layer, on logarithmic axes.

    Up to 8 layers are told apart by colour and mark; more of them are coloured by their place in the network.

    Args:
        epochs: What was measured, one entry an epoch.

    Returns:
        The figure; the lines of each panel are the layers, in order of execution.

    Raises:
        ValueError: If nothing was measured during training.

    Example:
        >>> epochs = [EpochCurvature(i, {"kappa/fc": 3.0 + i}) for i in range(2)]
        >>> training_curves(epochs).axes[0].lines[0].get_xydata().tolist()
        [[0.0, 3.0], [1.0, 4.0]]
    """
    tags = [tag.split("/", 1) for tag in dict.fromkeys(tag for each in epochs for tag in each.figures)]
    measures = [name for name in _PANELS if any(measure == name for measure, _ in tags)]
    if not measures:
        raise ValueError("Curvature was not measured during training; monitor_every_n_epochs does that.")
    layers = list(dict.fromkeys(layer for _, layer in tags))
    names = short_names(layers)
    few = len(layers) <= NAMED
    meaning = "" if few else " Lines are the darker, the earlier their layer is executed."
    figure, panels = board(
        [(0.7, 2.9)] * min(2, len(measures)),
        rows=math.ceil(len(measures) / 2),
        tall=2.1,
        title="Curvature of each layer during training",
        subtitle=f"One line a layer, measured before the validation of an epoch.{meaning}",
        right=width_of(names) if few else 0.75 + max(inches(names[0]), inches(names[-1])),
        header=0.3,
    )
    colours = _ramp()(np.linspace(0, 1, len(layers)))
    for axes, measure in zip(panels, measures, strict=False):
        for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
            value = numbers(each.figures.get(f"{measure}/{layer}") for each in epochs)
            drawn = np.where((value > 0) & (value < np.inf), value, np.nan)  # what a logarithmic axis can show
            colour, marker = series_style(i) if few else (colours[i], "." if len(epochs) == 1 else "")
            axes.plot([each.epoch for each in epochs], drawn, color=colour, marker=marker, markersize=4.0,
                      linewidth=1.2 if few else 0.8, label=name)  # fmt: skip
        _finish(axes, _PANELS[measure])
    for spare in panels[len(measures) :]:
        spare.remove()
    if few:
        legend_aside(panels[min(1, len(measures) - 1)])
    else:
        _depth(figure, panels[min(1, len(measures) - 1)], names)
    return figure


def _finish(axes: Axes, title: str) -> None:
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    axes.set_yscale("log")
    if np.isfinite(drawn).any():
        axes.set_ylim(np.nanmin(drawn) / 1.3, np.nanmax(drawn) * 1.3)
    else:
        axes.text(0.5, 0.5, "no positive value", transform=axes.transAxes, ha="center", fontsize=FONT, color=GREY)
    tidy_log(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_xlabel("epoch (the first is 0)", fontsize=FONT)
    axes.set_title(title, fontsize=FONT, loc="left", weight="bold")


def _ramp() -> Colormap:
    """Dark to light, without the end that is lost on white."""
    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _depth(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """The colours and the layers at their ends, right of the axes."""
    across = figure.get_figwidth()
    box = axes.get_position()
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _ramp()),
        cax=figure.add_axes((box.x1 + 0.2 / across, box.y0, 0.15 / across, box.height)),
    )
    bar.set_ticks([0, 1], labels=[names[0], names[-1]], fontsize=FONT, parse_math=False)
    bar.ax.invert_yaxis()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
