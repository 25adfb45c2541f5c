"""The distance of distributions, once a weight."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_dmbq_counts_every_weight():
    distances = by_bits(0.5, 0.25, 0.01)
    rows = row("a", 10, distribution_distance=distances), row("b", 100, distribution_distance=distances)
    np.testing.assert_allclose(costs_of("dmbq", *rows), [[5.0, 2.5, 0.1], [50.0, 25.0, 1.0]])
