"""The mean curvature times the squared error, as in HAWQ-V3 too."""

import numpy as np
from every import every
from method_rows import by_bits, costs_of, row


@every("method", ["hawq_v2", "hawq_v3"])
def test_hawq_v2_and_v3_are_the_mean_curvature_times_the_squared_error(method):
    errors = by_bits(4.0, 1.0, 0.1)
    rows = (
        row("a", 50, trace=100.0, rounding_error=errors),
        row("b", 200, trace=100.0, rounding_error=errors),
        row("c", trace=-1.0, rounding_error=errors),
    )
    np.testing.assert_allclose(costs_of(method, *rows), [[8.0, 2.0, 0.2], [2.0, 0.5, 0.05], [0.0, 0.0, 0.0]])
