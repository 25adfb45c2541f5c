"""What the cost of curvature is told in: its figures, and the two tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stopwatch import machine

from lightning_caq.report import text_table

TOLERANCE = 1e-3  # of the residual of the eigenpairs, relative to the largest eigenvalue


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        batches: Images in the batches that products are timed on.
        samples: Images for Lanczos and for everything that is compared with float64, those that the network is least
            sure of: of the others few have any curvature, and 200 eigenvalues would take many more.
        gram_samples: Images for the Gram spectrum.
        eigenpairs: How many eigenvalues Lanczos is asked for.
        rounds: Rounds that a median is taken over.
        network: Widths of the network whose κ and L are measured, and how many samples it gets.
        kappa_samples: Its samples.
    """

    batches: tuple[int, ...] = (128, 32)
    samples: int = 64
    gram_samples: int = 256
    eigenpairs: tuple[int, ...] = (10, 50, 200)
    rounds: int = 3
    network: tuple[int, ...] = (784, 512, 256, 128, 10)
    kappa_samples: int = 256


@dataclass
class Figures:
    """What ``--json`` prints."""

    hvp_per_gradient: float = 0.0
    layer_hvps_per_gradient: float = 0.0
    lanczos_products: dict[str, int] = field(default_factory=dict)
    gram_gradients: float = 0.0
    eigenvalue_relative_error: float = 0.0
    mb_per_sample: float = 0.0
    kappa_lipschitz_seconds: float = 0.0
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Report:
    """The figures, and the rows of the two tables: measures and growth."""

    figures: Figures = field(default_factory=Figures)
    measures: list[list[str]] = field(default_factory=list)
    growth: list[list[str]] = field(default_factory=list)

    def add(
        self, measure: str, ours: str, asked: str = "", limit: str = "", others: dict[str, str] | None = None
    ) -> None:
        """A row of the first table."""
        said = ", ".join(f"{name} {text}" for name, text in (others or {}).items())
        self.measures.append([measure, ours, asked, limit, said])


def as_text(report: Report, sizes: Sizes, taken: float) -> str:
    """The two tables, what they were measured on, and the machine."""
    found = [f"{name} {entry['version']}" for name, entry in report.figures.peers.items()]
    notes = (
        "A gradient is one forward and backward pass of the network as it is, by the weights of its layers. Medians of"
        f"\n{sizes.rounds} rounds in which everything in a row takes its turn. Eigenvalues, ours and the peers', are "
        f"those over the {sizes.samples}\nimages that the network is least sure of, at a tolerance of {TOLERANCE:g}; "
        f"one is wrong if it is off by more\nthan {TOLERANCE:g}, relatively, from float64.\n"
        f"Peers: {', '.join(found) or 'none installed (pip install -e .[bench])'}.\n"
        f"Machine: {machine()}. Took {taken:.0f} s."
    )
    first = text_table(["measure", "ours", "asked", "limit", "peers"], report.measures)
    second = text_table(["grows with", "size", "gradient", "cost"], report.growth)
    return f"{first}\n\n{second}\n\n{notes}"
