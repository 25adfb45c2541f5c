"""Half the quadratic form."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_mckp_is_half_the_quadratic_form():
    layer = row("a", second_order=by_bits(3.0, 0.5, -0.1))
    np.testing.assert_allclose(costs_of("mckp", layer), [[1.5, 0.25, 0.0]])
