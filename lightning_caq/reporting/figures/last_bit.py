"""Last bit: what the last step of each layer's bits bought, and what the next would buy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_caq.reporting.figures.scales import decades, lines, numbers, tidy_log
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, sheet
from lightning_caq.studies import LayerReason


@style.context("default")
def last_bits(reasons: Sequence[LayerReason]) -> Figure:
    """Damage avoided for a kilobyte, one layer a row on a logarithmic axis: by the last step, and by the next.

    Args:
        reasons: The layers' reasons.

    Returns:
        The figure. Its lines are, panel by panel, what joins the two marks, the next steps, and the last ones.

    Raises:
        ValueError: If the method predicts nothing of single layers.

    Example:
        >>> reason = LayerReason("fc", "cet", "nat", 3, 2, 4, 1.0, 5.0, 0.5, 8000, "modelled")
        >>> figure = last_bits([reason])
        >>> [line.get_xdata().tolist() for line in figure.axes[0].lines[1:]]
        [[0.5], [4.0]]
    """
    bought, more = (numbers(getattr(reason, name) for reason in reasons) for name in ("bought", "next"))
    both = np.concatenate([bought, more])
    drawn = both[np.isfinite(both) & (both > 0)]
    if not len(drawn):
        raise ValueError(
            "The method predicts no damage of single layers; give one with a table of costs, such as method='cet'."
        )
    figure, panels = sheet(
        [f"{reason.name} ({reason.bits:.3g})" for reason in reasons],
        title="What the last bit of each layer bought",
        subtitle=f"Damage that {reasons[0].method} predicts to be avoided, for each kilobyte: by the step to the bits "
        "that the layer has (in brackets), and by the step that it was not given. Where a mark is missing there is no "
        "such width, or it changes nothing.",
        width=3.4,
        right=0.1,
        header=0.1,
        footer=0.85,
    )
    limits = decades(drawn)
    for axes, rows in panels:
        place = np.arange(rows.stop - rows.start)
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        tidy_log(axes.xaxis)
        axes.plot(*lines(more[rows], bought[rows], place), color=TOLERANCE, linewidth=0.8)
        axes.plot(more[rows], place, "o", color=BAR, markersize=5, fillstyle="none")
        axes.plot(bought[rows], place, "o", color=POINT, markersize=6)
        unit = f"{reasons[0].unit} " if reasons[0].unit else ""
        axes.set_xlabel(f"damage avoided ({unit}a kB, logarithmic)", fontsize=FONT)
        axes.tick_params(axis="x", labelsize=FONT)
        axes.spines[["right", "top"]].set_visible(False)
    handles = [
        Line2D([], [], color=POINT, marker="o", markersize=6, linestyle="none", label="by the last step"),
        Line2D([], [], color=BAR, marker="o", markersize=5, fillstyle="none", linestyle="none", label="by the next"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=2, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure
