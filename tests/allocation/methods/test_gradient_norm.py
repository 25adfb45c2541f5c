"""A bound on the first-order change."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_gradient_norm_bounds_the_first_order_change():
    layer = row("a", gradient_norm=3.0, score_norm=0.5, rounding_error=by_bits(4.0, 0.25, 0.01))
    np.testing.assert_allclose(costs_of("gradient_norm", layer, objective="task"), [[6.0, 1.5, 0.3]])
    # Under distill the gradient is noise around zero; the norm of the scores stands for it.
    np.testing.assert_allclose(costs_of("gradient_norm", layer, objective="distill"), [[1.0, 0.25, 0.05]])
    rng = np.random.default_rng(0)
    for _ in range(100):  # Cauchy and Schwarz
        g, delta = rng.normal(size=(2, 20))
        bound = costs_of(
            "gradient_norm",
            row("a", gradient_norm=float(np.linalg.norm(g)), rounding_error=by_bits(float(delta @ delta), 0.0, 0.0)),
            objective="task",
        )
        assert abs(g @ delta) <= bound[0, 0]
