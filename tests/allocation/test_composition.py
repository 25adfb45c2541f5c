"""Composition against the proposal's recursion, vectors whose errors are known, and the formulas by hand."""

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.composition import compose, correlated_bound, layer_error_bound, precision_floor
from lightning_caq.errors import OptionError


def test_chain_is_the_proposals_recursion():
    """Φ ← L_i Φ + ε_i, layer after layer, is (∏ L) ε_0 + Σ ε_i ∏_{j>i} L_j."""
    stretch, errors = [0.5, 3.0, 2.0, 1.5], [0.1, 0.2, 0.3, 0.4]
    expected = 0.7
    for each, error in zip(stretch, errors, strict=True):
        expected = each * expected + error
    gains = [float(np.prod(stretch[i + 1 :])) for i in range(4)]
    found = compose(gains, errors, input_amplification=float(np.prod(stretch)), input_error=0.7)
    assert found.bound == pytest.approx(expected, rel=1e-12)


def test_parallel_errors_attain_the_bound_and_orthogonal_ones_the_rss():
    sizes = np.array([3.0, 4.0, 12.0])
    composed = compose([1.0] * 3, sizes)
    parallel, orthogonal = np.outer(sizes, [0.6, 0.8]), np.diag(sizes)
    assert composed.bound == pytest.approx(np.linalg.norm(parallel.sum(0)))
    assert composed.rss == pytest.approx(np.linalg.norm(orthogonal.sum(0)))
    assert correlated_bound(parallel @ parallel.T) == pytest.approx(composed.bound)
    assert correlated_bound(orthogonal @ orthogonal.T) == pytest.approx(composed.rss)


def test_correlated_bound_holds_for_every_choice_of_signs():
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    signs = 1 - 2 * ((np.arange(32)[:, None] >> np.arange(5)) & 1)
    worst = np.linalg.norm(signs @ vectors, axis=1).max()
    found = correlated_bound(vectors @ vectors.T)
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.linalg.norm(lengths) <= found <= lengths.sum()
    assert found >= worst


def test_layer_bound_holds_for_a_curved_function():
    """f(z) = z², L = 2 |z| near z, ρ = 1: the error of rounding input and output stays below the bound."""
    z, p = 3.0, np.arange(2, 9)
    bound = layer_error_bound(p, lipschitz=[2 * z], input_norm=[z], output_norm=[z**2], remainder=[1.0])[0]
    step = 0.5**p
    worst = np.abs((z * (1 + step)) ** 2 - z**2) + z**2 * step
    assert (worst <= bound * (1 + 1e-12)).all()
    assert bound == pytest.approx((2 * z * z + z**2) * step + z**2 * step**2)


def test_floor_is_where_the_curved_part_equals_the_error():
    floors = precision_floor([2.0, 8.0, 1e-9], [6.0, 4.0, 1.0], error=0.125)
    assert np.array([2.0, 8.0]) * np.array([6.0, 4.0]) ** 2 * 4.0 ** -floors[:2] == pytest.approx(0.125)
    assert floors[2] == 0


@every(
    ("call", "words"),
    [
        (lambda: compose([1.0], [1.0, 2.0]), "1 amplifications and 2 errors"),
        (lambda: compose([1.0, -2.0], [1.0, 1.0]), "amplifications: entry 1 is -2.0"),
        (lambda: compose([1.0], [float("nan")]), "errors: entry 0 is nan"),
        (lambda: correlated_bound([[np.inf]]), "NaN or infinite"),
        (lambda: precision_floor([1.0], [1.0], error=0.0), "error=0.0 is not allowed"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(OptionError, match=words):
        call()
