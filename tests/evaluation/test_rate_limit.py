"""The limit of the rate against what is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_caq.evaluation.rate_limit import differential_entropy, rate_limit, shannon_limit


def test_entropies_of_known_densities() -> None:
    rng, n = np.random.default_rng(0), 50_000
    for values, bits in (
        (rng.normal(0, 0.1, n), 0.5 * math.log2(2 * math.pi * math.e * 0.01)),
        (rng.laplace(0, 3.0, n), math.log2(2 * math.e * 3.0)),
        (rng.uniform(-1, 1, n), 1.0),
    ):
        assert differential_entropy(values) == pytest.approx(bits, abs=0.03)
        assert differential_entropy(8 * values) == pytest.approx(bits + 3, abs=0.03)


def test_the_limit_of_a_gaussian_is_half_the_logarithm_of_signal_over_noise() -> None:
    values = np.random.default_rng(1).normal(0, 2.0, 50_000)
    for rate in (0.5, 1.0, 3.0):
        assert shannon_limit(values, 4.0 * 4.0**-rate) == pytest.approx(rate, abs=0.03)
    assert shannon_limit(values, 5.0) == 0.0
    assert shannon_limit(np.ones(10), 0.1) == 0.0


def test_scalar_quantization_at_high_rate_is_a_quarter_of_a_bit_above() -> None:
    values = np.random.default_rng(2).normal(0, 1, 200_000)
    codes = (values / 0.05).round()
    counts = np.unique(codes, return_counts=True)[1] / len(codes)
    bits = float(-(counts * np.log2(counts)).sum())
    found = rate_limit({"fc": values}, {"fc": float(((0.05 * codes - values) ** 2).mean())}, {"fc": bits})
    assert found.gap == pytest.approx(0.5 * math.log2(2 * math.pi * math.e / 12), abs=0.03)  # Gish & Pierce 1968


def test_layers_count_by_their_weights() -> None:
    rng = np.random.default_rng(3)
    weights = {"a": rng.normal(0, 1, 30_000), "b": rng.normal(0, 1, 10_000)}
    found = rate_limit(weights, {"a": 1 / 16, "b": 1 / 4}, {"a": 2.5, "b": 1.5})
    assert found.bits == pytest.approx(2.25)
    assert found.limit == pytest.approx(1.75, abs=0.03)
    assert found.gap == pytest.approx(0.5, abs=0.03)


def test_the_limit_at_other_errors_is_that_of_each_layer_there() -> None:
    rng = np.random.default_rng(4)
    weights = {"a": rng.normal(0, 1, 20_000), "b": rng.laplace(0, 1, 20_000)}
    errors, bits = {"a": 1 / 64, "b": 1 / 4}, {"a": 3.0, "b": 2.0}
    found = rate_limit(weights, errors, bits)
    for share in (0.25, 1.0, 9.0):
        there = rate_limit(weights, {name: share * error for name, error in errors.items()}, bits)
        assert found.limit_at(share) == pytest.approx(there.limit)
