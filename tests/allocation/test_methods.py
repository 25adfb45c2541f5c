"""Every method's table against numbers worked out by hand, and what the registry lets in."""

import doctest
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.methods import available_methods, get_method, is_search, register_method
from lightning_caq.errors import OptionError
from lightning_caq.measures.registry import available_measures
from lightning_caq.profile import CurvatureProfile, LayerCurvature

BITS = (2, 4, 8)
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SEARCHES = {"random_search", "evolution", "cet_subspace"}


def _row(name, weights=100, **values):
    return LayerCurvature(name, weights=weights, channels=4, macs=weights, **values)


def _by_bits(*values):
    return dict(zip(BITS, values, strict=True))


def _costs(method, *rows, **values):
    return get_method(method).costs(CurvatureProfile(rows, **values), BITS)


def _cheapest(method, profile, avg_bits):
    """The best allocation of all, by trying each; between equal ones the one with more bits."""
    costs = get_method(method).costs(profile, BITS)
    weights = [row.weights for row in profile.layers]
    feasible = [
        columns
        for columns in product(range(len(BITS)), repeat=len(weights))
        if sum(n * BITS[c] for n, c in zip(weights, columns, strict=True)) <= avg_bits * sum(weights)
    ]
    best = min(feasible, key=lambda cols: (sum(costs[i, c] for i, c in enumerate(cols)), [-c for c in cols]))
    return tuple(BITS[c] for c in best)


@pytest.fixture
def _own_registry(monkeypatch):
    monkeypatch.setattr("lightning_caq.allocation.methods._registered", {})


# ------------------------------------------------------------------------------------------------------- the registry


def test_methods_that_were_promised_are_there():
    tables = {
        "uniform", "gradient_norm", "hessian_diagonal", "hawq", "hawq_v2", "hawq_v3", "mckp", "zeroq", "limpq", "dmbq",
        "caq", "caq_bound", "cet", "cet_expected",
    }  # fmt: skip
    assert tables | SEARCHES <= set(available_methods())


@every("name", available_methods())
def test_methods_say_what_they_need_and_what_they_are(name):
    method = get_method(name)
    assert method.needs <= available_measures()
    assert is_search(method) == (name in SEARCHES)
    assert hasattr(method, "costs") != is_search(method)


@every("name", sorted(set(available_methods()) - {"weight_mse"}))
def test_the_page_on_methods_has_each(name):
    assert f"(`{name}`)" in PAGE.read_text(encoding="utf-8")


def test_an_unknown_method():
    with pytest.raises(OptionError, match=r"method='magic' is not known; choose from 'caq'"):
        get_method("magic")


class _Mine:
    needs = frozenset({"rounding_error"})

    def costs(self, profile, bits):
        return np.zeros((len(profile.layers), len(bits)))


@pytest.mark.usefixtures("_own_registry")
def test_a_method_of_ones_own():
    first, second = _Mine(), _Mine()
    register_method("mine", first)
    assert "mine" in available_methods()
    assert get_method("mine") is first
    register_method("mine", second)  # as when a notebook's cell is run again
    assert get_method("mine") is second
    assert "mine" not in {path.stem for path in Path(PAGE.parents[1], "lightning_caq/allocation/methods").iterdir()}


class _Both(_Mine):
    search = _Mine.costs


class _WithoutNeeds:
    costs = _Mine.costs


@pytest.mark.usefixtures("_own_registry")
@every(
    ("name", "method", "words"),
    [
        ("Mine", _Mine(), "name='Mine' is not allowed"),
        ("my method", _Mine(), "lower-case letters"),
        ("", _Mine(), "name='' is not allowed"),
        (3, _Mine(), "name=3 is not allowed"),
        ("cet", _Mine(), "belongs to a built-in method"),
        ("mine", _Mine, "not a class"),
        ("mine", _Both(), "one of 'costs"),
        ("mine", _WithoutNeeds(), "frozenset 'needs'"),
        ("mine", None, "method=None is no method"),
    ],
)
def test_what_is_not_registered(name, method, words):
    with pytest.raises(OptionError, match=words):
        register_method(name, method)
    assert "mine" not in available_methods()


@pytest.mark.usefixtures("_own_registry")
def test_examples_of_the_page():
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    results = doctest.testfile(str(PAGE), module_relative=False, optionflags=options, encoding="utf-8")
    assert results.attempted > 5
    assert results.failed == 0


# --------------------------------------------------------------------------------------------------------- the tables


def test_uniform_gives_whole_budgets_to_every_layer():
    profile = CurvatureProfile(tuple(_row(str(n), n) for n in (10, 1000, 37, 4096)))
    for b in BITS:
        assert set(_cheapest("uniform", profile, b)) == {b}
    even = CurvatureProfile(tuple(_row(str(i)) for i in range(4)))
    assert sorted(_cheapest("uniform", even, 3.0)) == [2, 2, 4, 4]


def test_gradient_norm_bounds_the_first_order_change():
    row = _row("a", gradient_norm=3.0, score_norm=0.5, rounding_error=_by_bits(4.0, 0.25, 0.01))
    np.testing.assert_allclose(_costs("gradient_norm", row, objective="task"), [[6.0, 1.5, 0.3]])
    # Under distill the gradient is noise around zero; the norm of the scores stands for it.
    np.testing.assert_allclose(_costs("gradient_norm", row, objective="distill"), [[1.0, 0.25, 0.05]])
    rng = np.random.default_rng(0)
    for _ in range(100):  # Cauchy and Schwarz
        g, delta = rng.normal(size=(2, 20))
        bound = _costs(
            "gradient_norm",
            _row("a", gradient_norm=float(np.linalg.norm(g)), rounding_error=_by_bits(float(delta @ delta), 0.0, 0.0)),
            objective="task",
        )
        assert abs(g @ delta) <= bound[0, 0]


def test_hessian_diagonal_is_half_its_energy():
    rows = _row("a", diagonal_energy=_by_bits(3.0, 0.5, 0.1)), _row("b", diagonal_energy=_by_bits(1.0, 0.2, 0.0))
    np.testing.assert_allclose(_costs("hessian_diagonal", *rows), [[1.5, 0.25, 0.05], [0.5, 0.1, 0.0]])


def test_hawq_is_the_largest_eigenvalue_times_the_squared_error():
    errors = _by_bits(4.0, 1.0, 0.1)
    rows = _row("a", top_eigenvalue=5.0, rounding_error=errors), _row("b", top_eigenvalue=-2.0, rounding_error=errors)
    np.testing.assert_allclose(_costs("hawq", *rows), [[20.0, 5.0, 0.5], [8.0, 2.0, 0.2]])


@every("method", ["hawq_v2", "hawq_v3"])
def test_hawq_v2_and_v3_are_the_mean_curvature_times_the_squared_error(method):
    errors = _by_bits(4.0, 1.0, 0.1)
    rows = (
        _row("a", 50, trace=100.0, rounding_error=errors),
        _row("b", 200, trace=100.0, rounding_error=errors),
        _row("c", trace=-1.0, rounding_error=errors),
    )
    np.testing.assert_allclose(_costs(method, *rows), [[8.0, 2.0, 0.2], [2.0, 0.5, 0.05], [0.0, 0.0, 0.0]])


def test_the_quadratic_methods_agree_on_a_sphere():
    """Where H is c times the identity all of them are ½ c ‖Δ‖², or twice that."""
    c, n, errors = 3.0, 100, _by_bits(4.0, 1.0, 0.1)
    energy = {b: c * e for b, e in errors.items()}
    row = _row(
        "a", n, top_eigenvalue=c, trace=c * n, rounding_error=errors, diagonal_energy=energy, second_order=energy,
        subspace_curvature=0.0, subspace_energy=dict.fromkeys(BITS, 0.0),
    )  # fmt: skip
    expected = np.array([[0.5 * energy[b] for b in BITS]])
    for method in ("mckp", "hessian_diagonal", "cet", "cet_expected"):
        np.testing.assert_allclose(_costs(method, row, residual_curvature=c), expected)
    for method in ("hawq", "hawq_v2"):
        np.testing.assert_allclose(_costs(method, row, residual_curvature=c), 2 * expected)


def test_mckp_is_half_the_quadratic_form():
    row = _row("a", second_order=_by_bits(3.0, 0.5, -0.1))
    np.testing.assert_allclose(_costs("mckp", row), [[1.5, 0.25, 0.0]])


def test_zeroq_is_the_divergence():
    np.testing.assert_allclose(_costs("zeroq", _row("a", kl=_by_bits(0.7, 0.1, 1e-4))), [[0.7, 0.1, 1e-4]])


def test_limpq_is_the_scale_whatever_the_size():
    scales = _by_bits(0.5, 0.2, 0.01)
    rows = _row("a", 10, scale_importance=scales), _row("b", 10_000, scale_importance=scales)
    np.testing.assert_allclose(_costs("limpq", *rows), [[0.5, 0.2, 0.01]] * 2)


def test_dmbq_counts_every_weight():
    distances = _by_bits(0.5, 0.25, 0.01)
    rows = _row("a", 10, distribution_distance=distances), _row("b", 100, distribution_distance=distances)
    np.testing.assert_allclose(_costs("dmbq", *rows), [[5.0, 2.5, 0.1], [50.0, 25.0, 1.0]])


def test_caq_costs_are_squared_output_errors():
    rows = (
        _row("a", carried_error=_by_bits(3.0, 0.75, 0.03)),
        _row("b", carried_error=_by_bits(0.0, 0.0, 0.0)),
    )
    np.testing.assert_allclose(_costs("caq", *rows), [[9.0, 9 / 16, 9e-4], [0.0, 0.0, 0.0]])


def test_caq_gives_bits_to_the_layer_whose_errors_are_amplified():
    rows = tuple(_row(str(a), carried_error=_by_bits(a, a / 4, a / 100)) for a in (0.1, 10.0))
    assert _cheapest("caq", CurvatureProfile(rows), 5.0) == (2, 8)


def test_caq_bound_is_the_theorem():
    row = _row("a", lipschitz=2.0, input_norm=3.0, output_norm=4.0, remainder=0.5, amplification=10.0)
    # L ‖z‖ + ‖f‖ = 10, ρ ‖z‖² = 4.5
    expected = [[(10 * (10 / 2**b + 4.5 / 4**b)) ** 2 for b in BITS]]
    np.testing.assert_allclose(_costs("caq_bound", row), expected)


def test_caq_bound_holds_for_a_layer_whose_input_and_output_are_rounded():
    """y = relu(W z) with z and y off by a relative 2^−b: never further from the exact output than ε(b)."""
    rng = np.random.default_rng(0)
    W, bits = rng.normal(size=(6, 8)), 4
    for _ in range(200):
        z = rng.normal(size=8)
        off = lambda x, u: x + u / np.linalg.norm(u) * np.linalg.norm(x) * 2.0**-bits  # noqa: E731
        near = off(z, rng.normal(size=8))
        exact, rounded = np.maximum(W @ z, 0), np.maximum(W @ near, 0)
        error = np.linalg.norm(off(rounded, rng.normal(size=6)) - exact)
        row = _row(
            "a", lipschitz=float(np.linalg.norm(W, 2)), input_norm=float(np.linalg.norm(z)),
            output_norm=float(np.linalg.norm(rounded)), remainder=0.0, amplification=1.0,
        )  # fmt: skip
        assert error**2 <= get_method("caq_bound").costs(CurvatureProfile((row,)), [bits])[0, 0]


def _cet_row(name, energy, change=(), outside=()):
    return _row(
        name, subspace_energy=_by_bits(*energy), rounding_error={2: 4.0, 4: 1.0, 8: 0.1},
        loss_change=dict(change), outside=outside,
    )  # fmt: skip


def test_cet_costs_are_half_the_energy_of_the_rounding_error():
    expected = [[0.5 * (2 + 1.2), 0.5 * (0.5 + 0.3), 0.5 * (0.1 + 0.03)]]
    np.testing.assert_allclose(_costs("cet", _cet_row("a", (2.0, 0.5, 0.1)), residual_curvature=0.3), expected)


def test_cet_uses_what_was_measured_where_the_model_fails():
    rows = (
        _cet_row("a", (2.0, 0.5, 0.1), {2: 7.0, 4: 0.4}, (2,)),
        _cet_row("b", (2.0, 0.5, 0.1), {2: -1.0, 4: 0.4}, (2,)),  # rounding that helps by chance is worth nothing
    )
    np.testing.assert_allclose(_costs("cet", *rows, residual_curvature=0.0), [[7.0, 0.25, 0.05], [0.0, 0.25, 0.05]])


def test_cet_gives_bits_to_steep_layers():
    rows = (_cet_row("flat", (0.02, 0.005, 0.001)), _cet_row("steep", (20.0, 5.0, 1.0)))
    assert _cheapest("cet", CurvatureProfile(rows), 5.0) == (2, 8)


def test_expected_energy_is_the_mean_over_directions():
    """Σ |λ_j| (v_jᵀ Δ)² over random Δ of one length, with dense eigenvectors that span two layers."""
    rng = np.random.default_rng(0)
    vectors, values, mu, size = np.linalg.qr(rng.normal(size=(30, 5)))[0], np.array([9.0, 5, -3, 2, 1]), 0.2, 12
    part = vectors[:size]
    draws = rng.normal(size=(200_000, size))
    draws *= 2.0 / np.linalg.norm(draws, axis=1, keepdims=True)  # ‖Δ‖² = 4
    mean = float(((draws @ part) ** 2 @ np.abs(values)).mean())
    row = _row(
        "a", size, subspace_curvature=float(np.abs(values) @ (part**2).sum(0)), rounding_error=_by_bits(4.0, 1.0, 0.0)
    )
    costs = _costs("cet_expected", row, residual_curvature=mu)
    np.testing.assert_allclose(costs[0, 0], 0.5 * (mean + mu * 4), rtol=1e-2)
    np.testing.assert_allclose(costs[0], costs[0, 0] * np.array([1, 0.25, 0]))


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
