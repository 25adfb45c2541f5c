"""Spectrum: the eigenvalues of the objective's Hessian, and the layers that its steep directions live in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightning_caq.profile import CurvatureProfile
from lightning_caq.reporting.figures.scales import figure_text, largest, numbers, tidy_log
from lightning_caq.reporting.palette import BAR, POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, LINE, board, inches, short_names

SHOWN = 30
_WORDS = {
    "ellipsoid": "All eigenvalues found are positive: level sets of the loss are an ellipsoid, and every rounding "
    "error costs.",
    "hyperbolic paraboloid": "Eigenvalues of both signs: the loss is a hyperbolic paraboloid, a saddle, and some "
    "rounding errors lower it.",
}


@style.context("default")
def spectrum(profile: CurvatureProfile) -> Figure:
    """Eigenvalues by magnitude with their signs, the spectral density if it was measured, and the layers' shares.

    A layer's share is Σ |λ_j| ‖v_j restricted to the layer‖², out of all layers; the 30 largest have a row, all others
    share one. The point beside a bar is the layer's share of the weights.

    Args:
        profile: What was measured.

    Returns:
        The figure: eigenvalues, density if there is one, shares.

    Raises:
        ValueError: If there are no eigenvalues.

    Example:
        >>> figure = spectrum(CurvatureProfile((), eigenvalues=(4.0, -1.0), trace=3.5))
        >>> [line.get_ydata().tolist() for line in figure.axes[0].lines[:2]]
        [[4.0], [-1.0]]
    """
    values = np.array([x for x in profile.eigenvalues if np.isfinite(x)])
    if not len(values):
        raise ValueError("No eigenvalue was computed; method='cet' or study=True does that.")
    names, shares, sizes = _shares(profile)
    frames = [
        (0.75, 2.9),
        *([(0.9, 2.4)] if profile.density else []),
        *([(0.35 + max(map(inches, names)), 3.2)] if names else []),
    ]
    figure, axes = board(
        frames,
        tall=max(3.0, 0.19 * len(names)),
        title=f"Spectrum of the Hessian: {'an' if profile.shape[0] == 'e' else 'a'} {profile.shape}",
        subtitle=f"{_WORDS[profile.shape]} {_trace(profile, values)}"
        + (" Middle: how many eigenvalues lie where." if profile.density and names else "")
        + (" Right: the layers that the steep directions live in." if names else ""),
        right=0.35,
    )
    _eigenvalues(axes[0], values, numbers(profile.eigenvalue_residuals))
    if profile.density:
        weights = sum(row.weights for row in profile.layers)
        _density(axes[1], *profile.density, numbers(profile.density_stderr), weights)
    if names:
        _layers(axes[-1], names, shares, sizes)
    return figure


def _trace(profile: CurvatureProfile, values: NDArray[np.float64]) -> str:
    if not profile.trace:
        return f"{len(values)} eigenvalues."
    part = f"The {len(values)} of largest magnitude sum to {figure_text(values.sum())} of a trace of"
    return f"{part} {figure_text(profile.trace)} nat/weight² ({values.sum() / profile.trace:.1%})."


def _eigenvalues(axes: Axes, values: NDArray[np.float64], residuals: NDArray[np.float64]) -> None:
    """One point an eigenvalue, on a signed logarithmic axis if there are negative ones."""
    place = np.arange(1, len(values) + 1)
    up = values >= 0
    axes.plot(place[up], values[up], "o", markersize=4, color=TOLERANCE, label="positive")
    axes.plot(place[~up], values[~up], "D", markersize=4, color=POINT, label="negative")
    if len(residuals) == len(values):
        axes.errorbar(place, values, yerr=residuals, fmt="none", ecolor=GREY, linewidth=0.7, label="residual")
    if up.all() and (values > 0).all():
        axes.set_yscale("log")
        tidy_log(axes.yaxis)
    else:
        magnitudes = np.abs(values[values != 0])
        axes.set_yscale("symlog", linthresh=float(magnitudes.min()) if len(magnitudes) else 1.0)
        axes.axhline(0, color=GREY, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.set_xlabel("number, by magnitude", fontsize=FONT)
    axes.set_ylabel("eigenvalue λ (nat/weight², logarithmic)", fontsize=FONT)
    if not up.all() or len(residuals) == len(values):
        axes.legend(fontsize=FONT, frameon=False)


def _density(
    axes: Axes, grid: Sequence[float], values: Sequence[float], errors: NDArray[np.float64], weights: int
) -> None:
    """Share of eigenvalues by value, on logarithmic heights: most of them lie close to zero."""
    height = np.array(values)
    axes.plot(grid, height, color=TOLERANCE, linewidth=1)
    if len(errors) == len(height) and errors.any():
        low, high = height - errors, height + errors
        axes.fill_between(grid, low, high, color=BAR, linewidth=0, label="standard error")
        axes.legend(fontsize=FONT, frameon=False)
    axes.set_yscale("log")
    top = float(np.nanmax(height))
    axes.set_ylim(0.2 * top / max(weights, 1), 2 * top)  # a single eigenvalue stands out
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_xlabel("eigenvalue λ (nat/weight²)", fontsize=FONT)
    axes.set_ylabel("spectral density (weight²/nat, logarithmic)", fontsize=FONT)


def _shares(profile: CurvatureProfile) -> tuple[list[str], list[float], list[float]]:
    """Names, shares of the subspace's curvature and shares of the weights; the last row may stand for many layers."""
    rows = [row for row in profile.layers if row.subspace_curvature is not None and np.isfinite(row.subspace_curvature)]
    curvature = numbers(row.subspace_curvature for row in rows)
    if not len(rows) or not curvature.sum() > 0:
        return [], [], []
    weights: Mapping[int, float] = dict(enumerate(row.weights / sum(r.weights for r in rows) for row in rows))
    part = curvature / curvature.sum()
    kept = largest(part.tolist(), SHOWN)
    names, shares, sizes = (
        short_names([rows[i].name for i in kept]),
        [float(part[i]) for i in kept],
        [weights[i] for i in kept],
    )
    if len(kept) < len(rows):
        names.append(f"{len(rows) - len(kept)} other layers")
        shares.append(1 - sum(shares))
        sizes.append(1 - sum(sizes))
    return names, shares, sizes


def _layers(axes: Axes, names: list[str], shares: list[float], sizes: list[float]) -> None:
    own = min(SHOWN, len(names))
    place = range(own)
    axes.barh(place, [100 * s for s in shares[:own]], height=0.7, color=BAR, label="of the curvature in S")
    axes.plot([100 * s for s in sizes[:own]], place, "D", markersize=4, color=POINT, label="of the weights")
    for i in range(own, len(names)):  # in words: a bar for many layers would dwarf those of one
        text = f"  together {shares[i]:.1%} of the curvature, {sizes[i]:.1%} of the weights"
        axes.text(0, i, text, va="center_baseline", fontsize=FONT, color=GREY)
    axes.set_yticks(range(len(names)), names, fontsize=FONT, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 105 * max(*shares[:own], *sizes[:own], 0.01))
    axes.set_xlabel("share of all layers (%)", fontsize=FONT)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=FONT, frameon=False, borderpad=0,
                borderaxespad=LINE, handlelength=1.2)  # fmt: skip
