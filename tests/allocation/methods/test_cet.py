"""Half the energy of the rounding error in the steep directions and outside of them."""

import numpy as np
from method_rows import by_bits, cheapest, costs_of, row

from lightning_caq.profile import CurvatureProfile


def _cet_row(name, energy, change=(), outside=()):
    return row(
        name, subspace_energy=by_bits(*energy), rounding_error={2: 4.0, 4: 1.0, 8: 0.1},
        loss_change=dict(change), outside=outside,
    )  # fmt: skip


def test_cet_costs_are_half_the_energy_of_the_rounding_error():
    expected = [[0.5 * (2 + 1.2), 0.5 * (0.5 + 0.3), 0.5 * (0.1 + 0.03)]]
    np.testing.assert_allclose(costs_of("cet", _cet_row("a", (2.0, 0.5, 0.1)), residual_curvature=0.3), expected)


def test_cet_uses_what_was_measured_where_the_model_fails():
    rows = (
        _cet_row("a", (2.0, 0.5, 0.1), {2: 7.0, 4: 0.4}, (2,)),
        _cet_row("b", (2.0, 0.5, 0.1), {2: -1.0, 4: 0.4}, (2,)),  # rounding that helps by chance is worth nothing
    )
    np.testing.assert_allclose(costs_of("cet", *rows, residual_curvature=0.0), [[7.0, 0.25, 0.05], [0.0, 0.25, 0.05]])


def test_cet_gives_bits_to_steep_layers():
    rows = (_cet_row("flat", (0.02, 0.005, 0.001)), _cet_row("steep", (20.0, 5.0, 1.0)))
    assert cheapest("cet", CurvatureProfile(rows), 5.0) == (2, 8)
