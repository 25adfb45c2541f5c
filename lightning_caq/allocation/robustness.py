"""Robustness: which bits move when curvature and Lipschitz constants were measured wrongly (CAQ 4.4, ablation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_caq.allocation.tradeoff import allocate
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature

_CURVATURE = (
    "kappa",
    "remainder",
    "trace",
    "top_eigenvalue",
    "diagonal_energy",
    "second_order",
    "subspace_curvature",
    "subspace_energy",
)
_STRETCH = ("lipschitz", "amplification", "carried_error", "lipschitz_amplification")


@dataclass(frozen=True)
class Robustness:
    """What errors of measurement do to an allocation.

    Attributes:
        bits: Layer name to bits as measured.
        moved: Layer name to the share of draws in which its bits differ from these.
        draws: Layer name to bits, of every draw.
    """

    bits: dict[str, int]
    moved: dict[str, float]
    draws: tuple[dict[str, int], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers whose bits moved in any draw."""
        return tuple(name for name, share in self.moved.items() if share > 0)


def robustness(
    profile: CurvatureProfile,
    *,
    method: str = "caq",
    bits: Sequence[int],
    avg_bits: float,
    factor: float = 2.0,
    draws: int = 20,
    seed: int = 0,
) -> Robustness:
    """Allocate again with the curvature and the stretch of every layer a factor too large or too small.

    Args:
        profile: What was measured.
        method: Name of a method that gives a table of costs.
        bits: The candidate bit-widths.
        avg_bits: The budget, bits a weight.
        factor: How far off, 2 in the proposal.
        draws: Number of draws.
        seed: Seed of the directions.

    Returns:
        The bits, and how often each layer's moved.

    Raises:
        OptionError: If the factor is below 1, there is no draw, or the method searches instead of adding up costs.
        BudgetError: If the smallest bits are above the budget.

    Example:
        >>> errors = ("near", {2: 1.5, 4: 0.1}), ("close", {2: 1.0, 4: 0.1}), ("far", {2: 0.1, 4: 0.0})
        >>> rows = tuple(LayerCurvature(name, 1, 1, 1, carried_error=e) for name, e in errors)
        >>> result = robustness(CurvatureProfile(rows), bits=(2, 4), avg_bits=8 / 3)
        >>> result.bits, result.layers
        ({'near': 4, 'close': 2, 'far': 2}, ('near', 'close'))
    """
    if not factor >= 1 or draws < 1:
        raise OptionError(f"factor={factor!r}, draws={draws!r} are not allowed; give a factor from 1 up and a draw.")
    rng = np.random.default_rng(seed)

    def allocation(measured: CurvatureProfile) -> dict[str, int]:
        chosen = allocate(measured, method=method, bits=bits, avg_bits=avg_bits).bits
        return dict(zip([row.name for row in measured.layers], chosen, strict=True))

    as_measured = allocation(profile)
    drawn = tuple(allocation(perturbed(profile, factor, rng)) for _ in range(draws))
    moved = {name: float(np.mean([draw[name] != b for draw in drawn])) for name, b in as_measured.items()}
    return Robustness(as_measured, moved, drawn)


def perturbed(profile: CurvatureProfile, factor: float, rng: np.random.Generator) -> CurvatureProfile:
    """The profile with errors of measurement.

    Each layer draws one direction for its curvature (κ, ρ, and what the Hessian says of it) and one for its stretch
    (L, A); an error that all layers share would change no allocation under a budget of size. What rounding does to
    weights and outputs without either is known well and stays.

    Args:
        profile: What was measured.
        factor: How far off.
        rng: Draws the directions.

    Example:
        >>> profile = CurvatureProfile((LayerCurvature("fc", 1, 1, 1, kappa=3.0),))
        >>> perturbed(profile, 2.0, np.random.default_rng(0))["fc"].kappa
        6.0
    """
    signs = rng.choice((-1.0, 1.0), size=(len(profile.layers), 2))
    rows = [_off(row, *(factor**sign).tolist()) for row, sign in zip(profile.layers, signs, strict=True)]
    return replace(profile, layers=tuple(rows))


def _off(row: LayerCurvature, curvature: float, stretch: float) -> LayerCurvature:
    factors = {**dict.fromkeys(_CURVATURE, curvature), **dict.fromkeys(_STRETCH, stretch)}
    return replace(row, **{name: _times(getattr(row, name), factor) for name, factor in factors.items()})


def _times(measured: Any, factor: float) -> Any:
    """A figure, or one for each bit-width, times a factor; what was not measured stays so."""
    if isinstance(measured, dict):
        return {bits: value * factor for bits, value in measured.items()}
    return None if measured is None else measured * factor
