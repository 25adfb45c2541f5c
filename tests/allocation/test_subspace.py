"""The subspace problem against its optimality conditions, solved by nested root finding."""

from dataclasses import replace

import numpy as np
import pytest
from every import every
from scipy.optimize import brentq

from lightning_caq.allocation.methods import get_method
from lightning_caq.allocation.search import SearchSpace
from lightning_caq.allocation.subspace import matching_bits, noise_bits, solve_subspace
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def _optimum(a, r, n, limit):
    """σ from the stationarity of Σ a σ² + ν Σ n log2(1 + r / (√12 σ)), with ν from the size."""

    def noise(nu):
        slope = lambda s, i: 2 * a[i] * s**2 - nu * n[i] * (r[i] / (12**0.5 * s + r[i])) / np.log(2)  # noqa: E731
        return np.array([brentq(slope, 1e-12, 1e12, args=(i,), xtol=1e-15, rtol=1e-13) for i in range(len(a))])

    def excess(log_nu):
        return float(n @ np.log2(1 + r / (12**0.5 * noise(np.exp(log_nu))))) - limit

    return noise(np.exp(brentq(excess, -40, 40, xtol=1e-13)))


@every("seed", range(5))
def test_reaches_the_optimum(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 15))
    n = rng.integers(10, 10_000, k).astype(float)
    a, r = n * 10.0 ** rng.uniform(-3, 3, k), 10.0 ** rng.uniform(-1, 1, k)
    limit = rng.uniform(2.2, 6) * n.sum()
    expected = _optimum(a, r, n, limit)
    noise = solve_subspace(a, r, n[None], np.array([limit]))
    np.testing.assert_allclose(n @ np.log2(1 + r / (12**0.5 * noise)), limit, rtol=1e-9)
    assert a @ noise**2 <= a @ expected**2 * (1 + 1e-6)
    np.testing.assert_allclose(noise_bits(noise, r), noise_bits(expected, r), atol=1e-3)


def test_the_tightest_of_two_limits_binds():
    a, r = np.array([1.0, 50.0, 3.0]), np.array([1.0, 2.0, 0.5])
    rates = np.array([[100.0, 10.0, 40.0], [5.0, 80.0, 20.0]])
    both = solve_subspace(a, r, rates, np.array([600.0, 1e9]))
    alone = solve_subspace(a, r, rates[:1], np.array([600.0]))
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    used = rates @ noise_bits(solve_subspace(a, r, rates, np.array([450.0, 315.0])), r)
    assert used[0] <= 450 * (1 + 1e-9)
    assert used[1] <= 315 * (1 + 1e-9)


def test_more_room_means_less_noise():
    a, r, n = np.ones(3), np.ones(3), np.ones((1, 3))
    small, large = (solve_subspace(a, r, n, np.array([limit])) for limit in (6.0, 12.0))
    assert (large < small).all()


def test_uniform_rounding_noise_gives_its_bits_back():
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, 200_000)
    for bits in (2, 4, 6):
        step = 2 / (2**bits - 1)
        noise = np.sqrt(np.mean((w - np.round((w + 1) / step) * step + 1) ** 2))
        assert noise_bits(np.array([noise]), np.array([2.0]))[0] == pytest.approx(bits, abs=0.02)


def test_matching_is_by_distance_in_log():
    # ‖δ‖² = 4 · 1² = 4; in log 1 is as far from 4 as 16, 5 is nearer, and so is 0.9 · 4.
    errors = [{2: 16.0, 3: 5.0, 4: 1.0}, {2: 20.0, 3: 1.01}, {2: 100.0, 8: 3.6}]
    assert matching_bits(np.ones(3), errors, [4, 4, 4]) == [3, 3, 8]


BITS = (2, 3, 4, 6, 8)


def _layer(name, curvature, weights=100, outlier=1.0):
    """A layer whose rounding makes uniform noise, with a range that an outlier stretches."""
    errors = {b: weights * (1 / (2**b - 1)) ** 2 / 12 for b in BITS}
    return LayerCurvature(
        name, weights=weights, channels=1, macs=weights, weight_range=outlier,
        subspace_curvature=curvature, rounding_error=errors,
    )  # fmt: skip


def _search(rows, limit):
    space = SearchSpace((BITS,) * len(rows), np.array([[float(r.weights) for r in rows]]), np.array([limit]))
    never = lambda bits: pytest.fail("cet_subspace needs no evaluation")  # noqa: E731
    bits = get_method("cet_subspace").search(CurvatureProfile(tuple(rows)), space, never, 0)
    assert space.fits(bits)
    assert not any(space.fits(b) for b in space.higher(bits).values())
    return bits


def test_four_times_the_curvature_is_worth_one_bit():
    rows = [_layer("a", 1.0), _layer("b", 16.0), _layer("c", 256.0)]
    # Equal sizes: a_i σ_i² nearly equal, so σ falls by 4 and bits rise by 2 from layer to layer.
    assert _search(rows, 1200.0) == (2, 4, 6)


def test_match_corrects_what_outliers_do_to_the_formula():
    # Clipping makes the true error of the last layer that of range 1; its range is 64 times as wide, so the formula
    # asks for 6 bits more than the error needs.
    plain, outlier = _layer("a", 1.0), _layer("b", 1.0, outlier=64.0)
    assert _search([plain, outlier], 600.0) == (3, 3)


def test_zero_curvature_and_zero_range_are_no_accident():
    constant = replace(_layer("constant", 1.0, outlier=0.0), rounding_error=dict.fromkeys(BITS, 0.0))
    bits = _search([_layer("flat", 0.0), constant, _layer("steep", 10.0)], 1200.0)
    assert bits == (2, 2, 8)
    assert _search([_layer("a", 0.0), _layer("b", 0.0)], 500.0) in {(2, 3), (3, 2)}
