"""The theorem, by hand and against random layers."""

import numpy as np
from method_rows import BITS, costs_of, row

from lightning_caq.allocation.methods import get_method
from lightning_caq.profile import CurvatureProfile


def test_caq_bound_is_the_theorem():
    layer = row("a", lipschitz=2.0, input_norm=3.0, output_norm=4.0, remainder=0.5, amplification=10.0)
    # L ‖z‖ + ‖f‖ = 10, ρ ‖z‖² = 4.5
    expected = [[(10 * (10 / 2**b + 4.5 / 4**b)) ** 2 for b in BITS]]
    np.testing.assert_allclose(costs_of("caq_bound", layer), expected)


def test_caq_bound_holds_for_a_layer_whose_input_and_output_are_rounded():
    """y = relu(W z) with z and y off by a relative 2^−b: never further from the exact output than ε(b)."""
    rng = np.random.default_rng(0)
    W, bits = rng.normal(size=(6, 8)), 4
    for _ in range(200):
        z = rng.normal(size=8)
        off = lambda x, u: x + u / np.linalg.norm(u) * np.linalg.norm(x) * 2.0**-bits  # noqa: E731
        near = off(z, rng.normal(size=8))
        exact, rounded = np.maximum(W @ z, 0), np.maximum(W @ near, 0)
        error = np.linalg.norm(off(rounded, rng.normal(size=6)) - exact)
        layer = row(
            "a", lipschitz=float(np.linalg.norm(W, 2)), input_norm=float(np.linalg.norm(z)),
            output_norm=float(np.linalg.norm(rounded)), remainder=0.0, amplification=1.0,
        )  # fmt: skip
        assert error**2 <= get_method("caq_bound").costs(CurvatureProfile((layer,)), [bits])[0, 0]
