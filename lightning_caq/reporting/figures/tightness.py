"""Tightness: predicted against observed output error over bit-widths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from lightning_caq.evaluation.tightness import Tightness
from lightning_caq.reporting.figures.scales import numbers, tidy_log
from lightning_caq.reporting.palette import SERIES
from lightning_caq.reporting.sheet import FONT, board, legend_aside, width_of

# Field of Tightness, what it is, colour and marker.
_PREDICTIONS = (
    ("lipschitz", "Lipschitz constants (certified)", SERIES[3], "^"),
    ("bound", "Φ, sum (bound to first order)", SERIES[1], "D"),
    ("correlated", "Φ corr, errors as they align", SERIES[5], "P"),
    ("rss", "Φ rss, independent errors", SERIES[2], "s"),
    ("linear", "signed sum, first order", SERIES[0], "v"),
)


@style.context("default")
def tightness_curves(found: Mapping[int, Tightness]) -> Figure:
    """Output error with every layer rounded to nearest at one bit-width: what was predicted, and what it was.

    Args:
        found: Bit-width to errors.

    Returns:
        The figure: on the left the errors, on the right predicted over observed. A prediction that was not made has no
        line.

    Raises:
        ValueError: If there is no bit-width.

    Example:
        >>> figure = tightness_curves({2: Tightness(2.0, 6.0, 3.0, 2.5, 2.2), 4: Tightness(0.5, 1.0, 0.6, 0.5, 0.5)})
        >>> figure.axes[1].lines[0].get_xydata().tolist()  # Φ over observed
        [[2.0, 3.0], [4.0, 2.0]]
    """
    if not found:
        raise ValueError("No bit-width was studied.")
    bits = sorted(found)
    observed = numbers(found[b].observed for b in bits)
    labels = [label for _, label, *_ in _PREDICTIONS]
    figure, (errors, ratios) = board(
        [(0.85, 3.1), (0.75, 2.6)],
        tall=3.0,
        title="How far predictions of the output error hold",
        subtitle="Every layer rounded to nearest at the same bit-width. Left: errors. Right: predicted over observed; "
        "1 is exact, above it a prediction is too pessimistic.",
        right=width_of(labels) + 0.2,
    )
    for name, label, colour, marker in _PREDICTIONS:
        values = numbers(getattr(found[b], name) for b in bits)
        if np.isfinite(values).any():
            errors.plot(bits, values, color=colour, marker=marker, markersize=5, linewidth=1.2)
            ratio = numbers(found[b].ratios.get(name) for b in bits)
            ratios.plot(bits, ratio, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    errors.plot(bits, observed, color="black", marker="o", markersize=5.5, linewidth=1.6)
    ratios.plot([], [], color="black", marker="o", markersize=5.5, linewidth=1.6, label="observed")
    ratios.axhline(1, color="black", linewidth=1, linestyle=(0, (4, 3)))
    for axes in (errors, ratios):
        axes.set_yscale("log")
        axes.set_xticks(bits)
        axes.set_xlim(bits[0] - 0.4, bits[-1] + 0.4)
        axes.set_xlabel("bits a weight, every layer", fontsize=FONT)
        axes.grid(color="#eeeeee", linewidth=0.6)
    low, high = ratios.get_ylim()
    ratios.set_ylim(min(low, 0.5), max(high, 2.0))
    tidy_log(ratios.yaxis)
    tidy_log(errors.yaxis)
    errors.set_ylabel("error of the output (its own unit, rms over samples)", fontsize=FONT)
    ratios.set_ylabel("predicted / observed", fontsize=FONT)
    legend_aside(ratios)
    return figure
