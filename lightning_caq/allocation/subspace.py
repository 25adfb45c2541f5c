"""The subspace problem: how much noise each layer may carry under a model size (CET Eq. 13)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, NonlinearConstraint, brentq, minimize

Vector = NDArray[np.float64]

_ITERATIONS = 500
_RANGE = 60.0  # of log σ, on either side
_TINY = 1e-300


def noise_bits(noise: Vector, ranges: Vector) -> Vector:
    """Bits at which uniform rounding makes noise of this size: b = log2(1 + range / (√12 σ)).

    A grid of 2^b values has 2^b − 1 steps, and rounding to steps of width s makes noise of variance s² / 12.

    Args:
        noise: σ_i, root mean square of a weight's error, shape (layers,).
        ranges: range_i of the weights, same shape.

    Returns:
        Bits, not rounded, same shape.

    Example:
        >>> noise_bits(np.array([1 / 12**0.5]), np.array([15.0]))
        array([4.])
    """
    bits: Vector = np.log2(1 + ranges / (np.sqrt(12) * noise))
    return bits


def solve_subspace(curvatures: Vector, ranges: Vector, rates: NDArray[np.float64], limits: Vector) -> Vector:
    """Noise levels σ_i that minimise Σ_i a_i σ_i² under ModelSize(σ) = Σ_i rate_i b_i(σ_i) ≤ limit.

    CET Eq. 13, Σ_j |λ_j| (v_jᵀ δ)² + μ ‖δ‖², as it is for noise of an equal level within a layer and in no preferred
    direction: a_i = Σ_j |λ_j| ‖v_j restricted to layer i‖² + μ n_i. Taken literally, with every δ free, the problem
    loses the curvature: n unknowns can avoid m eigenvectors, and what is left is equal noise everywhere.

    In log σ both sides are convex, so there is one optimum. The paper walks there with Adam; here it is sequential
    quadratic programming, which keeps the limits exactly and needs tens of steps.

    Args:
        curvatures: a_i ≥ 0, shape (layers,).
        ranges: range_i of the weights, shape (layers,).
        rates: What one bit of a layer takes of each limit, shape (constraints, layers); n_i for the size in bits.
        limits: Shape (constraints,).

    Returns:
        σ_i, shape (layers,).

    Example:
        >>> a, n = np.array([1.0, 16.0]), np.ones((1, 2))  # equal sizes: a_i σ_i² nearly equal, a quarter of the noise
        >>> sigma = solve_subspace(a, np.array([1e6, 1e6]), n, np.array([30.0]))
        >>> round(float(sigma[0] / sigma[1]), 3), round(float(noise_bits(sigma, 1e6).sum()), 6)
        (4.0, 30.0)
    """
    weights = np.maximum(curvatures / max(float(curvatures.max()), _TINY), 1e-12)
    start = _within(np.zeros(len(weights)), ranges, rates, limits)

    def objective(x: Vector) -> tuple[float, Vector]:
        """Log Σ a σ², which has no unit, and its gradient."""
        energy = weights * np.exp(2 * (x - x.max()))
        return float(np.log(energy.sum()) + 2 * x.max()), 2 * energy / energy.sum()

    def used(x: Vector) -> Vector:
        """Parts of the limits."""
        return rates @ noise_bits(np.exp(x), ranges) / limits

    result = minimize(
        objective,
        start,
        jac=True,
        method="SLSQP",
        bounds=Bounds(start - _RANGE / 3, start + _RANGE / 3),
        constraints=NonlinearConstraint(used, -np.inf, 1, lambda x: rates * _bits_slope(x, ranges) / limits[:, None]),
        options={"maxiter": _ITERATIONS, "ftol": 1e-12},
    )
    return np.exp(_within(result.x, ranges, rates, limits))


def matching_bits(noise: Vector, errors: Sequence[dict[int, float]], weights: Sequence[int]) -> list[int]:
    """The bit-width whose true error ‖Δ_i(b)‖ is nearest to ‖δ_i‖ = σ_i √n_i in log (CET §3.4, method 2).

    Args:
        noise: σ_i.
        errors: Bits to ‖Δ_i(b)‖², of each layer.
        weights: n_i.

    Returns:
        Bits of each layer.

    Example:
        >>> matching_bits(np.array([0.5]), [{2: 16.0, 4: 1.0, 8: 0.01}], [4])  # ‖δ‖ = 1
        [4]
    """
    goals = np.log(noise**2 * np.asarray(weights, dtype=np.float64))
    return [
        min(row, key=lambda b: (abs(np.log(max(row[b], _TINY)) - goal), b))
        for row, goal in zip(errors, goals, strict=True)
    ]


def _bits_slope(x: Vector, ranges: Vector) -> Vector:
    """∂b_i / ∂ log σ_i = −r / (1 + r) / log 2, r = range / (√12 σ)."""
    ratio = ranges / (np.sqrt(12) * np.exp(x))
    slope: Vector = -ratio / (1 + ratio) / np.log(2)
    return slope


def _within(x: Vector, ranges: Vector, rates: NDArray[np.float64], limits: Vector) -> Vector:
    """All log σ moved together until the tightest limit binds."""
    x = x - x.max()

    def excess(shift: float) -> float:
        return float(((rates @ noise_bits(np.exp(x + shift), ranges)) / limits).max()) - 1

    low, high = -_RANGE, _RANGE
    if excess(low) <= 0 or excess(high) >= 0:  # no layer has a range, or the limit is beyond any noise
        return x
    moved: Vector = x + brentq(excess, low, high, xtol=1e-12)
    return moved
