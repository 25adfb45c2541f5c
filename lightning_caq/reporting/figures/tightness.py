"""Tightness: predicted against observed output error over bit-widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_caq.reporting.figures.scales import numbers, tidy_log
from lightning_caq.reporting.palette import SERIES
from lightning_caq.reporting.sheet import FONT, board, legend_aside, width_of
from lightning_caq.studies import Tightness

# Field of Tightness, what it is, colour and marker.
_PREDICTIONS = (
    ("lipschitz", "Lipschitz constants (certified)", SERIES[3], "^"),
    ("bound", "Φ, bound to first order", SERIES[1], "D"),
    ("correlated", "Φ corr, errors as they align", SERIES[5], "P"),
    ("rss", "Φ rss, independent errors", SERIES[2], "s"),
    ("linear", "signed sum, first order", SERIES[0], "v"),
)


@style.context("default")
def tightness_curves(found: Mapping[int, Tightness], plan: tuple[float, Tightness] | None = None) -> Figure:
    """Output error with weights rounded to nearest: what was predicted, and what it was.

    Args:
        found: Bit-width to errors with every layer at it.
        plan: Average bits of the plan, and errors with its bits.

    Returns:
        The figure: on the left the errors, on the right predicted over observed. A prediction that was not made has no
        line. The plan's errors are hollow marks, each after the line of its kind.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> figure = tightness_curves({2: Tightness(2.0, 6.0, 3.0, 2.5, 2.2), 4: Tightness(0.5, 1.0, 0.6, 0.5, 0.5)})
        >>> figure.axes[1].lines[0].get_xydata().tolist()  # Φ over observed
        [[2.0, 3.0], [4.0, 2.0]]
    """
    if not found and plan is None:
        raise ValueError("The predicted output error was not compared with the observed one; coding='fixed' does that.")
    labels = [label for _, label, *_ in _PREDICTIONS]
    figure, (errors, ratios) = board(
        [(0.85, 3.1), (0.75, 2.6)],
        tall=3.0,
        title="How far predictions of the output error hold",
        subtitle=("Every layer rounded to nearest at the same bit-width. " if found else "")
        + ("Hollow marks: the plan's bits, at their average, with nearest rounding. " if plan else "")
        + "Left: errors. Right: predicted over observed; 1 is exact, above it a prediction is too pessimistic.",
        right=width_of(labels) + 0.2,
    )
    for name, label, colour, marker in _PREDICTIONS:
        look = {"color": colour, "marker": marker, "markersize": 5.0, "linewidth": 1.2, "label": label}
        _series(errors, found, plan, attrgetter(name), look)
        _series(ratios, found, plan, partial(_ratio, name), look)
    look = {"color": "black", "marker": "o", "markersize": 5.5, "linewidth": 1.6, "label": "observed"}
    _series(errors, found, plan, attrgetter("observed"), look)
    ratios.axhline(1, color="black", linewidth=1, linestyle=(0, (4, 3)))
    bits = sorted({*found, *([round(plan[0], 2)] if plan and not found else [])})
    for axes in (errors, ratios):
        axes.set_yscale("log")
        axes.set_xticks(bits)
        axes.set_xlim(bits[0] - 0.4, bits[-1] + 0.4)
        axes.set_xlabel("bits a weight, every layer" if found else "bits a weight, on average", fontsize=FONT)
        axes.grid(color="#eeeeee", linewidth=0.6)
    low, high = ratios.get_ylim()
    ratios.set_ylim(min(low, 0.5), max(high, 2.0))
    tidy_log(ratios.yaxis)
    tidy_log(errors.yaxis)
    errors.set_ylabel("error of the output (its own unit, rms over samples)", fontsize=FONT)
    ratios.set_ylabel("predicted / observed", fontsize=FONT)
    handles, names = errors.get_legend_handles_labels()
    legend_aside(ratios, handles=handles, labels=names)
    return figure


def _ratio(name: str, found: Tightness) -> float | None:
    return found.ratios.get(name)


def _series(
    axes: Axes,
    found: Mapping[int, Tightness],
    plan: tuple[float, Tightness] | None,
    value: Callable[[Tightness], float | None],
    look: Mapping[str, Any],
) -> None:
    """A line over bit-widths and a hollow mark for the plan, as far as there are numbers."""
    bits = sorted(found)
    line = numbers(value(found[b]) for b in bits)
    if np.isfinite(line).any():
        axes.plot(bits, line, **look)
    mark = numbers([value(plan[1])] if plan else [])
    if plan and np.isfinite(mark).any():
        label = look["label"] if not found else None
        axes.plot([plan[0]], mark, **{**look, "label": label, "markersize": 8.0, "fillstyle": "none", "linestyle": ""})
