"""Squared output errors, and floors, by hand."""

import numpy as np
from method_rows import by_bits, cheapest, costs_of, row

from lightning_caq.allocation.methods import get_method
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def test_caq_costs_are_squared_output_errors():
    rows = (
        row("a", carried_error=by_bits(3.0, 0.75, 0.03)),
        row("b", carried_error=by_bits(0.0, 0.0, 0.0)),
    )
    np.testing.assert_allclose(costs_of("caq", *rows), [[9.0, 9 / 16, 9e-4], [0.0, 0.0, 0.0]])


def test_caq_gives_bits_to_the_layer_whose_errors_are_amplified():
    rows = tuple(row(str(a), carried_error=by_bits(a, a / 4, a / 100)) for a in (0.1, 10.0))
    assert cheapest("caq", CurvatureProfile(rows), 5.0) == (2, 8)


def test_floors_by_hand():
    rows = [
        LayerCurvature("bent", 1, 1, 1, remainder=2.0, diameter=8.0),  # ½ log2(2 · 64 / ½) = 4
        LayerCurvature("nearly straight", 1, 1, 1, remainder=1e-3, diameter=1.0),
        LayerCurvature("straight", 1, 1, 1, remainder=0.0, diameter=8.0),
    ]
    for method in ("caq", "caq_bound"):
        np.testing.assert_allclose(get_method(method).floors(CurvatureProfile(tuple(rows)), 0.5), [4, 0, 0])


def test_floors_hold_for_a_parabola():
    """f(z) = ρ z² on [0, d] leaves its chords over a grid of 2^p steps by ρ (d / 2^p)² / 4: below ε at the floor."""
    rho, d, epsilon = 3.0, 2.0, 0.01
    profile = CurvatureProfile((LayerCurvature("f", 1, 1, 1, remainder=rho, diameter=d),))
    p = get_method("caq").floors(profile, epsilon)[0]
    for bits, enough in ((np.ceil(p), True), (np.floor(p) - 1, False)):
        z = np.linspace(0, d, 100_001)
        knots = np.linspace(0, d, int(2**bits) + 1)
        assert (np.abs(np.interp(z, knots, rho * knots**2) - rho * z**2).max() <= epsilon) == enough
