"""Half the energy of the diagonal."""

import numpy as np
from method_rows import by_bits, costs_of, row


def test_hessian_diagonal_is_half_its_energy():
    rows = row("a", diagonal_energy=by_bits(3.0, 0.5, 0.1)), row("b", diagonal_energy=by_bits(1.0, 0.2, 0.0))
    np.testing.assert_allclose(costs_of("hessian_diagonal", *rows), [[1.5, 0.25, 0.05], [0.5, 0.1, 0.0]])
