"""The importance of the scale."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_limpq_is_the_scale_whatever_the_size():
    scales = by_bits(0.5, 0.2, 0.01)
    rows = row("a", 10, scale_importance=scales), row("b", 10_000, scale_importance=scales)
    np.testing.assert_allclose(costs_of("limpq", *rows), [[0.5, 0.2, 0.01]] * 2)
