"""Subspace: how much of the rounding error lies in the short-axis subspace, nearest against the chosen rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_caq.evaluation.shares import SubspaceShare
from lightning_caq.reporting.figures.scales import decades, lines, tidy_log
from lightning_caq.reporting.palette import FAINT, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, inches, sheet
from lightning_caq.studies import Energy

_ROWS = (("short", -0.19, TOLERANCE), ("rest", 0.19, POINT))


@style.context("default")
def subspace(shares: Sequence[SubspaceShare]) -> Figure:
    """The energy ½ ΔᵀHΔ of every layer's rounding error, in the short-axis subspace S and outside it.

    Rings are nearest rounding, discs the rounding that was chosen; a line joins the two. The share of S is written
    beside each layer, nearest → chosen.

    Args:
        shares: The layers' energies.

    Returns:
        The figure. Of each panel the collections hold, in order, the nearest and chosen points in S, then outside it.

    Raises:
        ValueError: If no energy was measured.

    Example:
        >>> figure = subspace([SubspaceShare("fc", 2, Energy(0.3, 0.1), Energy(0.01, 0.2))])
        >>> [c.get_offsets()[:, 0].tolist() for c in figure.axes[0].collections if len(c.get_offsets()) == 1][:2]
        [[0.3], [0.01]]
    """
    energies = [e for s in shares for e in (s.nearest, s.chosen) if e is not None]
    if not energies:
        raise ValueError("No energy of a rounding error was measured; study=True does that.")
    compared = any(s.chosen for s in shares)
    texts = [_change(s) for s in shares]
    figure, panels = sheet(
        [s.name for s in shares],
        title="Rounding errors in and outside steep directions",
        subtitle="½ ΔᵀHΔ of each layer's rounding error Δ: its part in the short-axis subspace S, and the rest. Beside "
        f"the axes the share of S{', nearest → chosen' if compared else ' with nearest rounding'}. {_sum(shares)}",
        width=3.4,
        right=0.25 + max(map(inches, [*texts, "share of S"])),
        header=0.3,
        footer=1.1,
    )
    low, high = decades([abs(v) for e in energies for v in (e.short, e.rest)])
    for axes, rows in panels:
        _points(axes, shares[rows], (low, 2 * high))
        for i, text in [(-0.9, "share of S"), *enumerate(texts[rows])]:
            axes.annotate(text, (1, i), (8, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                          va="center_baseline", fontsize=FONT, color=GREY, annotation_clip=False)  # fmt: skip
    handles = [
        Line2D([], [], color=TOLERANCE, marker="o", linestyle="none", label="in S, chosen rounding"),
        Line2D([], [], color=TOLERANCE, marker="o", fillstyle="none", linestyle="none", label="in S, nearest"),
        Line2D([], [], color=POINT, marker="D", markersize=5, linestyle="none", label="outside S, chosen"),
        Line2D(
            [], [], color=POINT, marker="D", markersize=5, fillstyle="none", linestyle="none", label="outside, nearest"
        ),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=2, fontsize=FONT, frameon=False, borderpad=1.0)
    return figure


def _points(axes: Axes, shares: Sequence[SubspaceShare], limits: tuple[float, float]) -> None:
    place = np.arange(len(shares))
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    tidy_log(axes.xaxis)
    for part, offset, colour in _ROWS:
        before, after = (
            [_part(e, part) for e in side] for side in zip(*((s.nearest, s.chosen) for s in shares), strict=True)
        )
        marker, size = ("o", 20) if part == "short" else ("D", 14)
        axes.scatter(
            before, place + offset, s=size, marker=marker, facecolors="white", edgecolors=colour, linewidths=1, zorder=3
        )
        axes.scatter(after, place + offset, s=size, marker=marker, color=colour, linewidths=1, zorder=3)
        axes.plot(*lines(before, after, place + offset), color=FAINT, linewidth=1, zorder=1)
    axes.plot(*lines(*limits, place[1:] - 0.5), color="#eeeeee", linewidth=0.6, zorder=0)
    axes.set_xlabel("½ ΔᵀHΔ (nat, logarithmic)", fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[["right", "top"]].set_visible(False)


def _part(energy: Energy | None, part: str) -> float:
    """A magnitude that a logarithmic axis can show, else NaN."""
    value = np.nan if energy is None else abs(float(getattr(energy, part)))
    return value if value > 0 else np.nan


def _change(share: SubspaceShare) -> str:
    before, after = (_percent(energy) for energy in (share.nearest, share.chosen))
    return before if share.chosen is None else f"{before} → {after}"


def _percent(energy: Energy | None) -> str:
    share = None if energy is None else energy.share
    return "–" if share is None else f"{share:.0%}"


def _sum(shares: Sequence[SubspaceShare]) -> str:
    """The energies of all layers that were measured both ways, in one sentence."""
    both = [(s.nearest, s.chosen) for s in shares if s.nearest is not None and s.chosen is not None]
    if not both:
        return ""
    near, chosen = (sum(pair[i].short for pair in both) for i in (0, 1))
    near_rest, chosen_rest = (sum(pair[i].rest for pair in both) for i in (0, 1))
    return (
        f"Sum over layers, nearest → chosen: in S {near:.3g} → {chosen:.3g} nat, outside {near_rest:.3g} → "
        f"{chosen_rest:.3g} nat."
    )
