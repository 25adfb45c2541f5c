"""Robustness: which bits move when curvature and Lipschitz constants were measured wrongly (CAQ 4.4, ablation)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature

_CURVATURE = ("kappa", "remainder")
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
    costs: Callable[[CurvatureProfile], NDArray[np.float64]],
    solve: Callable[[NDArray[np.float64]], tuple[int, ...]],
    *,
    factor: float = 2.0,
    draws: int = 20,
    seed: int = 0,
) -> Robustness:
    """Solve again with the curvature (κ_i, ρ_i) and stretch (L_i, A_i) of every layer a factor too large or too small.

    Each layer draws at random one direction for its curvature and one for its stretch; an error that all layers share
    would change no allocation under a budget of size.

    Args:
        profile: What was measured.
        costs: Turns a profile into a table, such as ``lambda p: get_method("caq").costs(p, bits)``.
        solve: Turns a table into the bits of every layer.
        factor: How far off, 2 in the proposal.
        draws: Number of draws.
        seed: Seed of the directions.

    Returns:
        The bits, and how often each layer's moved.

    Raises:
        OptionError: If the factor is below 1 or there is no draw.

    Example:
        >>> rows = tuple(LayerCurvature(name, 1, 1, 1, amplification=a) for name, a in (("a", 1.0), ("b", 1.5)))
        >>> costs = lambda p: np.array([[row.amplification, 0.0] for row in p.layers])
        >>> dearest = lambda table: tuple(4 if i == table[:, 0].argmax() else 2 for i in range(len(table)))
        >>> found = robustness(CurvatureProfile(rows), costs, dearest)
        >>> found.bits, found.layers  # b is dearer, but not twice as dear
        ({'a': 2, 'b': 4}, ('a', 'b'))
    """
    if not factor >= 1 or draws < 1:
        raise OptionError(f"factor={factor!r}, draws={draws!r} are not allowed; give a factor from 1 up and a draw.")
    rng = np.random.default_rng(seed)
    names = [row.name for row in profile.layers]

    def allocate(measured: CurvatureProfile) -> dict[str, int]:
        return dict(zip(names, solve(costs(measured)), strict=True))

    bits = allocate(profile)
    found = []
    for _ in range(draws):
        signs = rng.choice((-1.0, 1.0), size=(len(names), 2))
        rows = tuple(_off(row, *(factor**sign)) for row, sign in zip(profile.layers, signs, strict=True))
        found.append(allocate(replace(profile, layers=rows)))
    moved = {name: float(np.mean([draw[name] != bits[name] for draw in found])) for name in names}
    return Robustness(bits, moved, tuple(found))


def _off(row: LayerCurvature, curvature: float, stretch: float) -> LayerCurvature:
    factors = {**dict.fromkeys(_CURVATURE, curvature), **dict.fromkeys(_STRETCH, stretch)}
    return replace(row, **{name: _times(getattr(row, name), factor) for name, factor in factors.items()})


def _times(measured: Any, factor: float) -> Any:
    if isinstance(measured, dict):
        return {bits: value * factor for bits, value in measured.items()}
    return None if measured is None else measured * factor
