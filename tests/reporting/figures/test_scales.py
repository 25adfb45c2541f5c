"""Axes and correlations against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from every import every
from scipy.stats import spearmanr

from lightning_caq.reporting.figures.scales import agreement, decades, largest, numbers, rank_correlation


def test_rank_correlation_is_that_of_scipy_with_ties() -> None:
    draws = np.random.default_rng(0)
    kappa, bits = draws.lognormal(size=40), draws.integers(2, 6, 40).astype(float)
    assert rank_correlation(kappa, bits) == pytest.approx(spearmanr(kappa, bits).statistic)
    assert rank_correlation(kappa, -kappa) == pytest.approx(-1)


@every(("a", "b"), [([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, 3, 4], [5, 5, 5, 5])])
def test_rank_correlation_is_none_where_it_says_nothing(a, b) -> None:
    assert rank_correlation(a, b) is None


def test_agreement_says_what_there_is_to_say() -> None:
    rising = np.arange(1.0, 6)
    assert agreement(rising, rising).endswith("over 5 layers: +1.00.")
    assert agreement(rising, np.full(5, 3.0)) == "Every layer has the same bits."
    assert agreement(np.full(5, 3.0), rising) == "Every layer has the same κ."
    assert agreement(rising[:3], rising[:3]) == ""


def test_decades_hold_what_is_positive_and_finite() -> None:
    assert decades([0.5, math.nan, math.inf, -3, 0]) == (0.1, 1.0)
    assert decades([]) == (0.1, 10.0)
    low, high = decades([1.0])
    assert low < 1 <= high


def test_largest_keeps_the_order_and_puts_nan_last() -> None:
    assert largest([math.nan, 1, 3, 2], 2) == [2, 3]
    assert largest([math.nan, 1], 5) == [0, 1]
    assert np.isnan(numbers([None])[0])
