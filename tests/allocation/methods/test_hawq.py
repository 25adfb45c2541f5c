"""The largest eigenvalue times the squared error."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_hawq_is_the_largest_eigenvalue_times_the_squared_error():
    errors = by_bits(4.0, 1.0, 0.1)
    rows = row("a", top_eigenvalue=5.0, rounding_error=errors), row("b", top_eigenvalue=-2.0, rounding_error=errors)
    np.testing.assert_allclose(costs_of("hawq", *rows), [[20.0, 5.0, 0.5], [8.0, 2.0, 0.2]])
