"""The divergence."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_zeroq_is_the_divergence():
    np.testing.assert_allclose(costs_of("zeroq", row("a", kl=by_bits(0.7, 0.1, 1e-4))), [[0.7, 0.1, 1e-4]])
