"""Training: the curvature of a network epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochCurvature:
    """What was measured of every layer in one epoch of training.

    Attributes:
        epoch: The epoch, counted from 0.
        figures: ``<measure>/<layer>`` to value; the measures are ``kappa`` (out²/in²), ``lipschitz`` (out/in),
            ``trace`` and ``top_eigenvalue`` (both nat/weight²).
    """

    epoch: int
    figures: dict[str, float]
