import numpy as np
import pytest

from lightning_caq.allocation.knapsack import solve
from lightning_caq.allocation.methods import available_methods, get_method
from lightning_caq.measures.measure import MEASURES
from lightning_caq.measures.profile import CurvatureProfile, LayerCurvature

BITS = (2, 4, 8)


def _row(name, weights=100, **values):
    return LayerCurvature(name, weights=weights, channels=4, macs=weights, **values)


def test_methods_that_were_promised_are_there():
    assert {"uniform", "caq", "cet"} <= set(available_methods())


@pytest.mark.parametrize("name", available_methods())
def test_methods_say_what_they_need(name):
    assert get_method(name).needs <= MEASURES


def test_an_unknown_method():
    with pytest.raises(ModuleNotFoundError):
        get_method("magic")


def _solve(method, profile, avg_bits, bits=BITS):
    weights = [row.weights for row in profile.layers]
    return solve(get_method(method).costs(profile, bits), weights, bits, avg_bits * sum(weights)).bits


def test_uniform_gives_whole_budgets_to_every_layer():
    profile = CurvatureProfile(tuple(_row(str(n), n) for n in (10, 1000, 37, 4096)))
    for b in BITS:
        assert set(_solve("uniform", profile, b)) == {b}
    even = CurvatureProfile(tuple(_row(str(i)) for i in range(4)))
    assert sorted(_solve("uniform", even, 3.0)) == [2, 2, 4, 4]


def test_caq_costs_are_squared_output_errors():
    rows = (
        _row("a", output_error={2: 1.0, 4: 0.25, 8: 0.01}, amplification=3.0),
        _row("b", output_error={2: 2.0, 4: 0.5, 8: 0.02}, amplification=0.0),
    )
    expected = [[9.0, 9 / 16, 9e-4], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(get_method("caq").costs(CurvatureProfile(rows), BITS), expected)


def test_caq_gives_bits_to_the_layer_whose_errors_are_amplified():
    errors = {2: 1.0, 4: 0.25, 8: 0.01}
    rows = tuple(_row(str(a), output_error=errors, amplification=a) for a in (0.1, 10.0))
    assert _solve("caq", CurvatureProfile(rows), 5.0) == (2, 8)


def _cet_row(name, energy, change=(), outside=()):
    return _row(
        name, subspace_energy=dict(zip(BITS, energy, strict=True)), rounding_error={2: 4.0, 4: 1.0, 8: 0.1},
        loss_change=dict(change), outside=outside,
    )  # fmt: skip


def test_cet_costs_are_half_the_energy_of_the_rounding_error():
    profile = CurvatureProfile((_cet_row("a", (2.0, 0.5, 0.1)),), residual_curvature=0.3)
    expected = [[0.5 * (2 + 1.2), 0.5 * (0.5 + 0.3), 0.5 * (0.1 + 0.03)]]
    np.testing.assert_allclose(get_method("cet").costs(profile, BITS), expected)


def test_cet_uses_what_was_measured_where_the_model_fails():
    rows = (
        _cet_row("a", (2.0, 0.5, 0.1), {2: 7.0, 4: 0.4}, (2,)),
        _cet_row("b", (2.0, 0.5, 0.1), {2: -1.0, 4: 0.4}, (2,)),  # rounding that helps by chance is worth nothing
    )
    costs = get_method("cet").costs(CurvatureProfile(rows, residual_curvature=0.0), BITS)
    np.testing.assert_allclose(costs, [[7.0, 0.25, 0.05], [0.0, 0.25, 0.05]])


def test_cet_gives_bits_to_steep_layers():
    rows = (_cet_row("flat", (0.02, 0.005, 0.001)), _cet_row("steep", (20.0, 5.0, 1.0)))
    assert _solve("cet", CurvatureProfile(rows), 5.0) == (2, 8)
