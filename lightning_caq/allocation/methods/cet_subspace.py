"""CET by the paper's own route: noise levels from the subspace problem, bits from noise levels (CET §3.3 and §3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from lightning_caq.allocation.search import Bits, SearchSpace
from lightning_caq.allocation.subspace import matching_bits, noise_bits, solve_subspace
from lightning_caq.allocation.tables import layer_column
from lightning_caq.profile import CurvatureProfile


class Method:
    """Solves Eq. 13 for the noise σ_i that each layer may carry within the budget, and gives it the bits that make it.

    A search method, as its choice depends on the budget and minimises no sum of costs; it evaluates nothing. Bits
    follow in two ways. *Formula:* b = log2(1 + range / (√12 σ)), rounded, to the nearest allowed. *Match:* the
    bit-width whose true error is nearest to ‖δ_i‖ in log. Where they differ by more than one bit, as where outliers
    stretch the range, match is used, else formula. Rounded bits miss the budget a little: until they fit, the layer
    whose error ‖Δ_i‖ then exceeds ‖δ_i‖ the least goes a step down; while there is room, the one whose error exceeds it
    the most goes a step up.

    Example:
        >>> import numpy as np
        >>> from lightning_caq.profile import LayerCurvature
        >>> rows = [LayerCurvature(name, 10, 1, 10, weight_range=12**0.5, subspace_curvature=c,
        ...                        rounding_error={b: 10 / (2**b - 1) ** 2 for b in (2, 4, 6)})
        ...         for name, c in (("flat", 1.0), ("steep", 256.0))]
        >>> space = SearchSpace(((2, 4, 6), (2, 4, 6)), np.array([[10.0, 10.0]]), np.array([80.0]))
        >>> Method().search(CurvatureProfile(tuple(rows)), space, lambda bits: 0.0, seed=0)
        (2, 6)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rounding_error", "subspace"})

    def search(
        self, profile: CurvatureProfile, space: SearchSpace, evaluate: Callable[[tuple[int, ...]], float], seed: int
    ) -> tuple[int, ...]:
        """Bits by formula and match, within the space."""
        mu, rows = profile.residual_curvature or 0.0, profile.layers
        curvatures = layer_column(profile, "subspace_curvature") + mu * layer_column(profile, "weights")
        ranges = layer_column(profile, "weight_range")
        noise = solve_subspace(curvatures, ranges, space.rates, space.limits)
        allowed = [{b: row.rounding_error[b] for b in choice} for row, choice in zip(rows, space.choices, strict=True)]
        by_match = matching_bits(noise, allowed, [row.weights for row in rows])
        wanted = noise_bits(noise, ranges)
        by_formula = [min(choice, key=lambda b: abs(b - w)) for choice, w in zip(space.choices, wanted, strict=True)]
        bits = tuple(m if abs(m - f) > 1 else f for m, f in zip(by_match, by_formula, strict=True))

        return _fitted(bits, space, lambda i, b: allowed[i][b] / (noise[i] ** 2 * rows[i].weights))


def _fitted(bits: Bits, space: SearchSpace, excess: Callable[[int, int], float]) -> Bits:
    """The bits moved by single steps until they fit and leave no room; ``excess`` is ‖Δ_i(b)‖² / ‖δ_i‖²."""
    while not space.fits(bits):
        lower = space.lower(bits)
        bits = lower[min(lower, key=lambda i: excess(i, lower[i][i]))]
    while higher := {i: moved for i, moved in space.higher(bits).items() if space.fits(moved)}:
        bits = higher[max(higher, key=lambda i: excess(i, bits[i]))]
    return bits
