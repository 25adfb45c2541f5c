"""The picture of docs/measures.md: what measure() says of a ResNet-20 that was trained on CIFAR-10.

python docs/scripts/figures.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from networks import DATA, load_cifar10, load_network

from lightning_caq import CurvatureProfile, measure
from lightning_caq.profile import LayerCurvature
from lightning_caq.reporting.palette import POINT, TOLERANCE
from lightning_caq.reporting.sheet import FONT, GREY, LINE, MARGIN, TITLE_FONT, inches, short_names
from lightning_caq.utilities.progress import Progress

IMAGE = Path(__file__).resolve().parents[1] / "images/measures.png"
SAMPLES, SEED = 64, 0
BITS = 2
NEEDS = frozenset({"kappa", "kappa_mean", "lipschitz", "local_lipschitz", "trace", "top_eigenvalue", "loss_change"})

# Inches, as on every sheet.
WIDTH, ROW, GAP = 2.95, 0.175, 0.35
ABOVE, BELOW = 0.15 + 2.4 * LINE, 0.55


@dataclass(frozen=True)
class Series:
    """Points of one kind, one a layer.

    Attributes:
        label: What they are.
        values: Where they lie.
        errors: Half the length of their error bars.
        hollow: Which of them are drawn as rings.
    """

    label: str
    values: Sequence[float]
    errors: Sequence[float] | None = None
    hollow: Sequence[bool] | None = None


@dataclass(frozen=True)
class Panel:
    """Two figures of every layer that belong together.

    Attributes:
        title: What is seen.
        axis: Symbol and unit.
        first: Dark discs.
        second: Orange diamonds.
    """

    title: str
    axis: str
    first: Series
    second: Series


def quadratic_prediction(row: LayerCurvature) -> float:
    """gᵀΔ + ½ ΔᵀHΔ at ``BITS`` bits, nat, also where the quadratic model is out of its range."""
    return row.first_order[BITS] + 0.5 * row.second_order[BITS]


def panels(profile: CurvatureProfile) -> list[Panel]:
    """The four panels, row by row."""
    rows = profile.layers
    return [
        Panel(
            "κ: how far from linear",
            "out²/in²",
            Series("κ, largest norm", [r.kappa for r in rows], [r.kappa * r.kappa_tolerance for r in rows]),
            Series("the proposal's mean", [r.kappa_mean for r in rows], [r.kappa_mean_stderr for r in rows]),
        ),
        Panel(
            "L: how much it can stretch its input",
            "out/in",
            Series("L, certified", [r.lipschitz for r in rows], [r.lipschitz * r.lipschitz_tolerance for r in rows]),
            Series("on the samples", [r.local_lipschitz for r in rows]),
        ),
        Panel(
            "$H_{ii}$: curvature of the loss by the weights",
            "nat/weight²",
            Series("trace", [r.trace for r in rows], [r.trace_stderr for r in rows]),
            Series("top eigenvalue", [r.top_eigenvalue for r in rows], [r.top_eigenvalue_residual for r in rows]),
        ),
        Panel(
            f"Loss change, this layer alone at {BITS} bits",
            "nat",
            Series("measured", [r.loss_change[BITS] for r in rows]),
            Series(
                "quadratic model (hollow: out of range)",
                [quadratic_prediction(r) for r in rows],
                hollow=[BITS in r.outside for r in rows],
            ),
        ),
    ]


@style.context("default")
def draw(profile: CurvatureProfile) -> Figure:
    """Two by two panels, the layers as rows, every axis logarithmic."""
    names = short_names([row.name for row in profile.layers])
    left = MARGIN + max(map(inches, names)) + 0.1
    across = left + 2 * WIDTH + GAP + MARGIN
    tall = ROW * len(names)
    heading = MARGIN + 0.22 + 2 * LINE
    high = heading + 2 * (ABOVE + tall + BELOW)
    figure = Figure(figsize=(across, high), dpi=120)
    FigureCanvasAgg(figure)
    title = "What measure() says of the 20 layers of a trained ResNet-20"
    reading = (
        f"CIFAR-10, {profile.samples} training images, objective distill. Layers in order of execution, downwards; all "
        "axes are logarithmic.\nStandard errors and tolerances are drawn, and as a rule smaller than the points."
    )
    figure.text(MARGIN / across, 1 - MARGIN / high, title, va="top", fontsize=TITLE_FONT, weight="bold")
    below_title = 1 - (MARGIN + 0.24) / high
    figure.text(MARGIN / across, below_title, reading, va="top", fontsize=FONT, color=GREY, linespacing=1.4)
    for i, panel in enumerate(panels(profile)):
        down, right = divmod(i, 2)
        bottom = high - heading - (down + 1) * (ABOVE + tall) - down * BELOW
        x = left + right * (WIDTH + GAP)
        axes = figure.add_axes((x / across, bottom / high, WIDTH / across, tall / high))
        fill(axes, panel)
        axes.set_yticks(range(len(names)), [] if right else names, fontsize=FONT)
        axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def fill(axes: Axes, panel: Panel) -> None:
    """Two points a layer and a line between them, with the legend above the axes where no point can lie."""
    place = range(len(panel.first.values))
    axes.set_xscale("log")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.hlines(place, panel.first.values, panel.second.values, color="#bbbbbb", linewidth=1.2, zorder=1)
    for series, marker, colour in ((panel.first, "o", TOLERANCE), (panel.second, "D", POINT)):
        hollow = series.hollow or [False] * len(series.values)
        faces = ["white" if ring else colour for ring in hollow]
        size = 38 if marker == "o" else 17
        axes.scatter(series.values, place, s=size, marker=marker, c=faces, edgecolors=colour, linewidths=1.1, zorder=3)
        axes.scatter([], [], s=size, marker=marker, color=colour, label=series.label)
        if series.errors is not None:
            axes.errorbar(series.values, place, xerr=series.errors, fmt="none", ecolor=colour, zorder=2)
    axes.annotate(panel.title, (0, 1), (0, 72 * (0.06 + LINE * 1.3)), xycoords="axes fraction", va="bottom",
                  textcoords="offset points", fontsize=FONT + 1, weight="bold")  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=FONT, frameon=False, borderpad=0,
                borderaxespad=0.35, handletextpad=0.1, columnspacing=1.0, handlelength=1.4)  # fmt: skip
    axes.set_xlabel(panel.axis, fontsize=FONT)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=FONT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["right", "top"]].set_visible(False)


def summary(profile: CurvatureProfile) -> str:
    """What docs/measures.md says in words about this run."""
    assert profile.trace is not None
    inside = sum(BITS not in row.outside for row in profile.layers)
    kappa, lipschitz, *_ = panels(profile)
    return (
        f"{profile.samples} samples, rows kept {profile.kept:.6f}, {profile.shape}, trace {profile.trace:.4g}, "
        f"{len(profile.eigenvalues)} eigenvalues hold {sum(profile.eigenvalues) / profile.trace:.3%} of it, "
        f"quadratic model in range at {BITS} bits: {inside} of {len(profile.layers)} layers, "
        f"κ over its mean {_ratios(kappa)}, L over local L {_ratios(lipschitz)}, {profile.seconds:.0f} s"
    )


def _ratios(panel: Panel) -> str:
    """Smallest and largest ratio of the first figure to the second."""
    ratios = [a / b for a, b in zip(panel.first.values, panel.second.values, strict=True)]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of cifar10_small.npz and resnet20_cifar10.th")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where to write the picture")
    options = parser.parse_args()
    try:
        model, (train, _) = load_network("resnet20", options.data), load_cifar10(options.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    batches = train.sample(SAMPLES, SEED).batches(SAMPLES)  # κ and L look at the first batch only
    profile = measure(model, batches, needs=NEEDS, bits=(BITS,), samples=SAMPLES, seed=SEED, progress=Progress(print))
    draw(profile).savefig(options.image)
    print(summary(profile))
    print(f"{options.image}: {options.image.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
