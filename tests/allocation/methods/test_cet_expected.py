"""The mean over random directions."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_expected_energy_is_the_mean_over_directions():
    """Σ |λ_j| (v_jᵀ Δ)² over random Δ of one length, with dense eigenvectors that span two layers."""
    rng = np.random.default_rng(0)
    vectors, values, mu, size = np.linalg.qr(rng.normal(size=(30, 5)))[0], np.array([9.0, 5, -3, 2, 1]), 0.2, 12
    part = vectors[:size]
    draws = rng.normal(size=(200_000, size))
    draws *= 2.0 / np.linalg.norm(draws, axis=1, keepdims=True)  # ‖Δ‖² = 4
    mean = float(((draws @ part) ** 2 @ np.abs(values)).mean())
    layer = row(
        "a", size, subspace_curvature=float(np.abs(values) @ (part**2).sum(0)), rounding_error=by_bits(4.0, 1.0, 0.0)
    )
    costs = costs_of("cet_expected", layer, residual_curvature=mu)
    np.testing.assert_allclose(costs[0, 0], 0.5 * (mean + mu * 4), rtol=1e-2)
    np.testing.assert_allclose(costs[0], costs[0, 0] * np.array([1, 0.25, 0]))
