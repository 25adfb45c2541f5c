"""Coupled layers against brute force over every allocation."""

import itertools

import numpy as np
import pytest

from lightning_caq.allocation.solver.constraint import size_limit
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.allocation.solver.quadratic import couplings, solve_quadratic
from lightning_caq.errors import BudgetError, OptionError

BITS = (2, 3, 4, 6)


def _cost(costs, pairs, choice):
    own = sum(costs[i][c] for i, c in enumerate(choice))
    return own + sum(
        0.5 * (pairs[i, choice[i], j, choice[j]] + pairs[j, choice[j], i, choice[i]])
        for i, j in itertools.combinations(range(len(choice)), 2)
    )


def _case(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 6))
    noise = 0.5 ** np.array(BITS)[None, :, None] * rng.lognormal(0, 1, (layers, 1, 1))
    factors = (rng.normal(size=(layers, 1, 6)) + 0.3 * rng.normal(size=(layers, 4, 6))) * noise
    costs, pairs = 0.5 * (factors**2).sum(2), couplings(factors)
    if seed % 2:  # no Gram matrix: anything, not even symmetric
        costs, pairs = rng.exponential(size=costs.shape), rng.normal(size=pairs.shape)
    weights = rng.integers(1, 30, layers).tolist()
    return costs, pairs, size_limit(weights, BITS, float(np.floor(sum(weights) * rng.uniform(2, 6))))


def test_near_the_best_of_all_and_never_below_it():
    hits, cases = 0, 60
    for seed in range(cases):
        costs, pairs, size = _case(seed)
        found = solve_quadratic(costs, pairs, BITS, [size])
        chosen = [BITS.index(b) for b in found.bits]
        assert found.cost == pytest.approx(_cost(costs, pairs, chosen))
        assert found.usage["size"] == size.total(chosen) <= size.limit
        choices = itertools.product(range(4), repeat=len(costs))
        best = min(_cost(costs, pairs, c) for c in choices if size.total(c) <= size.limit)
        linear = solve(costs, BITS, [size])
        start = _cost(costs, pairs, [BITS.index(b) for b in linear.bits])
        assert found.relaxed <= found.bound <= best + 1e-9
        assert best - 1e-9 <= found.cost <= start + 1e-9
        hits += found.cost <= best + 1e-9
    assert hits >= 0.9 * cases


def test_couplings_are_those_of_the_whole_quadratic_form():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(3, 2, 5))
    pairs, costs = couplings(factors), 0.5 * (factors**2).sum(2)
    for choice in itertools.product(range(2), repeat=3):
        total = sum(factors[i, c] for i, c in enumerate(choice))
        assert _cost(costs, pairs, choice) == pytest.approx(0.5 * total @ total)


def test_errors_that_cancel_stay_together():
    """Alone each layer would be worth its bits; together their errors cancel, and the third is served instead."""
    factors = [[[3.0], [0.0]], [[-3.0], [0.0]], [[1.0], [0.0]]]
    costs = 0.5 * (np.array(factors) ** 2).sum(2)
    size = size_limit([1, 1, 1], (2, 4), 8)
    assert solve(costs, (2, 4), [size]).bits[2] == 2
    found = solve_quadratic(costs, couplings(factors), (2, 4), [size])
    assert (found.bits, found.cost) == ((2, 2, 4), 0.0)


def test_without_couplings_it_is_the_linear_optimum():
    costs, pairs, size = _case(1)
    found = solve_quadratic(costs, 0 * pairs, BITS, [size])
    assert found.cost == pytest.approx(solve(costs, BITS, [size]).cost)
    assert found.bound == pytest.approx(found.cost, rel=1e-5)


def test_a_layer_is_not_coupled_with_itself():
    costs, pairs, size = _case(1)
    own = pairs.copy()
    own[np.arange(len(costs)), :, np.arange(len(costs)), :] = -100.0
    assert solve_quadratic(costs, own, BITS, [size]) == solve_quadratic(costs, pairs, BITS, [size])


def test_bad_input():
    costs, pairs, _ = _case(0)
    tight = size_limit([1] * len(costs), BITS, 2 * len(costs) - 1)
    with pytest.raises(BudgetError, match="smallest choice"):
        solve_quadratic(costs, pairs, BITS, [tight])
    with pytest.raises(OptionError, match="pairs must be finite numbers of shape"):
        solve_quadratic(costs, pairs[:1], BITS, [])
    with pytest.raises(OptionError, match="pairs must be finite"):
        solve_quadratic(costs, pairs * np.nan, BITS, [])
    with pytest.raises(OptionError, match="layers, bit-widths, m"):
        couplings(np.zeros((2, 2)))
