"""Waterfall: how the layers' errors add up to the error of the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_caq.evaluation.shares import ErrorShare
from lightning_caq.reporting.figures.scales import figure_text, numbers
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, inches, sheet

SHOWN = 30


@style.context("default")
def error_waterfall(shares: Sequence[ErrorShare]) -> Figure:
    """Each layer's part of Σ A_i e_i ≥ Φ, largest first, with what was observed when only that layer was rounded.

    The 30 layers with the largest parts have a row each; all others share one.

    Args:
        shares: The layers' parts.

    Returns:
        The figure. Its bars are the predicted parts, from where the one before ends; its points the observed ones.

    Raises:
        ValueError: If no part was predicted.

    Example:
        >>> figure = error_waterfall([ErrorShare("a", 2, 1.0, 0.9), ErrorShare("b", 3, 3.0, 2.5)])
        >>> [(float(bar.get_x()), float(bar.get_width())) for bar in figure.axes[0].patches]
        [(0.0, 3.0), (3.0, 1.0), (0.0, 4.0)]
    """
    known = sorted((s for s in shares if np.isfinite(_predicted(s))), key=_predicted, reverse=True)
    if not known:
        raise ValueError("No layer's part of the output error was predicted; method='caq' or study=True does that.")
    shown, others = known[:SHOWN], known[SHOWN:]
    names, bits = [s.name for s in shown], [f"{s.bits:.3g}" for s in shown]
    parts = [_predicted(s) for s in shown]
    observed = numbers(s.observed for s in shown).tolist()
    if others:
        names.append(f"{len(others)} other layers")
        bits.append("")
        parts.append(sum(map(_predicted, others)))
        observed.append(np.nan)
    total = sum(parts)
    missing = len(shares) - len(known)
    shares_text = [f"{part / total:.1%}" if total > 0 else "–" for part in parts]
    figure, panels = sheet(
        [*names, "all layers"],
        title="Which layers the output error comes from",
        subtitle="Bars: the error that each layer's rounding is predicted to cause at the network's output, A·e, each "
        "from where the one before ends. Points: the error that was observed with only that layer rounded, from the "
        "same start; a point at the end of its bar is a perfect prediction."
        + (f" {missing} layers were not measured." if missing else ""),
        width=4.2,
        right=0.25 + inches("100.0%") + inches("bits") + 0.2,
        header=0.3,
        labels=["all layers"],
        footer=0.8,
    )
    # All rows fit one panel: there are at most 32.
    _bars(panels[0][0], parts, observed, total)
    _columns(panels[0][0], bits, [*shares_text, "100%"])
    handles = [
        Patch(color=BAR, label="predicted, A·e"),
        Patch(color=TOLERANCE, label="their sum"),
        Line2D([], [], color=POINT, marker="D", markersize=4, linestyle="none", label="observed, alone"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, fontsize=FONT, frameon=False, borderpad=1.2)
    return figure


def _predicted(share: ErrorShare) -> float:
    return np.nan if share.predicted is None else share.predicted


def _bars(axes: Axes, parts: Sequence[float], observed: Sequence[float], total: float) -> None:
    ends = np.cumsum(parts)
    starts = ends - np.asarray(parts)
    place = np.arange(len(parts))
    axes.barh(place, parts, left=starts, height=0.7, color=BAR)
    axes.barh([len(parts)], [total], height=0.7, color=TOLERANCE)
    axes.vlines(ends[:-1], place[:-1] + 0.35, place[1:] - 0.35, color=GREY, linewidth=0.6)
    axes.scatter(starts + observed, place, s=16, marker="D", color=POINT, zorder=3)
    reach = np.nanmax([total, *(starts + observed)])
    axes.set_xlim(0, 1.03 * reach or 1.0)
    axes.set_xlabel("error of the network's output (its own unit, rms over samples)", fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[["right", "top"]].set_visible(False)
    axes.set_title(f"Σ A·e = {figure_text(total)}", fontsize=FONT, loc="left", color=TOLERANCE, weight="bold")


def _columns(axes: Axes, bits: Sequence[str], shares: Sequence[str]) -> None:
    """Bits and shares in figures, right of the axes."""
    plain: dict[str, Any] = {
        "ha": "right",
        "va": "center_baseline",
        "fontsize": FONT,
        "color": GREY,
        "annotation_clip": False,
    }
    first = 0.15 + inches("bits")
    second = first + 0.2 + inches("100.0%")
    for x, head, texts in ((first, "bits", bits), (second, "share", shares)):
        for i, text in [(-0.9, head), *enumerate(texts)]:
            at = axes.get_yaxis_transform()
            axes.annotate(text, (1, i), (72 * x, 0), xycoords=at, textcoords="offset points", **plain)
