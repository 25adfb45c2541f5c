"""Steps: sensitivities, equal slope, and the search for a multiplier."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_caq.allocation.steps import (
    EXPONENTS,
    check_continuous,
    equal_slope,
    search_multiplier,
    sensitivities,
)
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def test_equal_slope_is_the_optimum_of_the_convex_programme() -> None:
    rng = np.random.default_rng(0)
    g, n = np.exp(rng.normal(0, 2, 5)), rng.integers(10, 1000, 5)
    # g_i is what a unit of squared error of the whole layer costs: damage Σ n_i g_i s_i², bits −Σ n_i log2 s_i.
    best = np.array(equal_slope(g, n.tolist(), 1.0))
    bits = -(n * np.log2(best)).sum()
    damage = (n * g * best**2).sum()
    for _ in range(200):
        other = best * np.exp(0.1 * rng.normal(size=5))
        other *= np.exp2(((-(n * np.log2(other)).sum()) - bits) / n.sum())  # the same bits
        assert (n * g * other**2).sum() >= damage * (1 - 1e-9)


def test_the_multiplier_is_the_mean_step_for_every_exponent() -> None:
    for exponent in EXPONENTS:
        steps = equal_slope(np.array([1.0, 7.0, 0.1]), [5, 20, 3], 0.3, exponent)
        assert np.exp(np.average(np.log(steps), weights=[5, 20, 3])) == pytest.approx(0.3)
    assert equal_slope(np.array([1.0, 7.0]), [5, 20], 0.3, 0.0) == pytest.approx((0.3, 0.3))


def test_sensitivities_are_costs_over_squared_errors() -> None:
    errors = {2: 8.0, 4: 0.5}
    measured = {"rounding_error": errors}
    rows = tuple(
        LayerCurvature(name, 4, 1, 4, carried_error={b: (g * e) ** 0.5 for b, e in errors.items()}, **measured)
        for name, g in (("a", 3.0), ("b", 0.2), ("c", 0.0))
    )
    profile = CurvatureProfile(rows)
    np.testing.assert_allclose(sensitivities("caq", profile, (2, 4)), [3.0, 0.2, 0.2])  # no cost: as the least one
    np.testing.assert_array_equal(sensitivities("uniform", profile, (2, 4)), np.ones(3))


def test_methods_that_choose_widths_give_no_sensitivities() -> None:
    with pytest.raises(OptionError, match="table of costs"):
        check_continuous("evolution")


def test_the_search_meets_budgets_of_all_sizes_in_few_tries() -> None:
    for target in (40, 300, 900, 1500):
        tried: list[float] = []

        def coded(m: float, tried: list[float] = tried) -> int:
            tried.append(m)
            return int(2000 * np.log2(1 + 1 / m) / 8) + 7

        found = search_multiplier(coded, target, start=0.05, weights=2000)
        assert 0.99 * target - 8 <= coded(found) <= target
        assert len(tried) < 12, target


def test_noise_in_the_bytes_does_not_break_the_budget() -> None:
    rng = np.random.default_rng(1)
    for target in (700, 911, 5000):
        for _ in range(20):
            sizes: dict[float, int] = {}

            def coded(m: float, sizes: dict[float, int] = sizes) -> int:
                size = 20_000 * np.log2(1 + 1 / m) / 8 * rng.uniform(0.99, 1.01)
                return sizes.setdefault(m, 4 * round(size / 4))

            assert 0.95 * target < sizes[search_multiplier(coded, target, start=3.0, weights=20_000)] <= target


def test_a_budget_that_no_multiplier_meets_is_refused() -> None:
    with pytest.raises(BudgetError, match="cannot be made as small as 10 bytes"):
        search_multiplier(lambda m: 40 + int(1000 / m), 10, start=1.0, weights=1000)
