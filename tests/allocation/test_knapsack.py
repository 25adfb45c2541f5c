"""The solver against brute force over every allocation."""

import itertools

import numpy as np
import pytest

from lightning_caq.allocation.knapsack import solve
from lightning_caq.errors import BudgetError


def _brute_force(costs, weights, bits, limit):
    """The least cost of all allocations within the limit."""
    best = np.inf
    for choice in itertools.product(range(len(bits)), repeat=len(weights)):
        if sum(n * bits[c] for n, c in zip(weights, choice, strict=True)) <= limit:
            best = min(best, sum(costs[i][c] for i, c in enumerate(choice)))
    return best


def _size(weights, bits):
    return sum(n * b for n, b in zip(weights, bits, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_is_optimal_and_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 7))
    bits = sorted(rng.choice([1, 2, 3, 4, 5, 6, 7, 8], size=rng.integers(1, 5), replace=False).tolist())
    weights = rng.integers(1, [10, 1000, 10**7][seed % 3], size=layers).tolist()
    costs = rng.exponential(size=(layers, len(bits))) * 10.0 ** rng.integers(-12, 6)
    if seed % 2:  # more bits help, as in practice; otherwise anything
        costs = -np.sort(-costs, axis=1)
    limit = rng.uniform(_size(weights, [bits[0]] * layers), _size(weights, [bits[-1]] * layers))
    found = solve(costs, weights, bits, limit)
    assert _size(weights, found.bits) <= limit
    expected = _brute_force(costs, weights, bits, limit)
    assert found.cost == pytest.approx(expected, rel=1e-6)
    assert found.cost == pytest.approx(sum(costs[i][bits.index(b)] for i, b in enumerate(found.bits)))
    assert found.bound <= found.cost * (1 + 1e-6)
    assert found.bound == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1, 10**3, 10**6, 10**8])
def test_a_budget_missed_by_one_bit_is_missed(scale):
    """The solver's own tolerance is relative: at millions of weights one bit is less than it."""
    weights, bits = [3 * scale + 1, 3 * scale], (2, 4)
    for limit, expected in ((_size(weights, (4, 2)), (4, 2)), (_size(weights, (4, 2)) - 1, (2, 4))):
        found = solve([[5.0, 0.0], [4.0, 0.0]], weights, bits, limit)
        assert found.bits == expected
        assert _size(weights, found.bits) <= limit


def test_many_layers_of_different_sizes_stay_within_the_budget():
    rng = np.random.default_rng(0)
    bits = (2, 3, 4, 5, 6, 8)
    for _ in range(20):
        weights = (10 ** rng.uniform(1, 6.5, size=25)).astype(int).tolist()
        costs = rng.exponential(size=(25, 1)) * 0.25 ** np.array(bits) * rng.uniform(0.5, 1.5, size=(25, 6))
        limit = rng.uniform(2, 8) * sum(weights)
        found = solve(costs, weights, bits, limit)
        assert _size(weights, found.bits) <= limit
        # No single layer can be improved with what is left of the budget.
        for i, b in enumerate(found.bits):
            for j, other in enumerate(bits):
                fits = _size(weights, found.bits) + weights[i] * (other - b) <= limit
                assert not fits or costs[i, j] >= costs[i, bits.index(b)] * (1 - 1e-6) - 1e-6 * costs.max()


def test_exact_budgets_can_be_used_up():
    assert solve([[4.0, 1.0]] * 3, [7, 7, 7], [2, 4], 7 * (4 + 4 + 4)).bits == (4, 4, 4)
    assert solve([[4.0, 1.0]] * 3, [7, 7, 7], [2, 4], 42.0).bits == (2, 2, 2)
    third = sum([10, 10, 10]) * (10 / 3)  # 3.333… bits a weight, with a rounding error in the limit
    assert solve([[4.0, 1.0]] * 3, [10, 10, 10], [2, 6], third).bits.count(6) == 1


def test_is_the_same_every_time():
    costs = [[1.0, 1.0], [1.0, 1.0]]
    assert len({solve(costs, [5, 5], [2, 4], 30).bits for _ in range(5)}) == 1


def test_costs_of_zero_and_below():
    assert solve([[0.0, 0.0]], [5], [2, 4], 30).cost == 0
    assert solve([[-1.0, -3.0], [2.0, -2.0]], [5, 5], [2, 4], 30).bits == (2, 4)


def test_bad_input():
    with pytest.raises(BudgetError, match="smallest choice takes 40 bits, the budget allows 39"):
        solve([[1.0, 1.0]] * 2, [10, 10], [2, 4], 39)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="costs must be finite; row 1 is not"):
            solve([[1.0, 1.0], [1.0, value]], [10, 10], [2, 4], 60)


def test_equal_costs_use_the_budget():
    assert solve([[0.0, 0.0, 0.0]] * 2, [10, 10], [2, 3, 4], 70).bits in {(3, 4), (4, 3)}


def test_one_huge_cost_does_not_blur_the_others():
    """A choice that nobody can afford must not set the scale on which the others are compared."""
    draws, bits = np.random.default_rng(5), [2, 3, 4, 5, 6, 8]
    for _ in range(40):
        weights = draws.integers(10, 1000, 5)
        costs = np.multiply.outer(weights * draws.lognormal(0, 1, 5), 0.25 ** np.array(bits, dtype=float))
        costs[draws.integers(5), 0] *= 1e6
        limit = float(draws.uniform(5, 7.5)) * weights.sum()
        choices = (
            (sum(costs[i, c] for i, c in enumerate(each)), each)
            for each in itertools.product(range(6), repeat=5)
            if sum(weights[i] * bits[c] for i, c in enumerate(each)) <= limit
        )
        best = min(choices)[0]
        found = solve(costs, weights.tolist(), bits, limit)
        assert found.cost == pytest.approx(best, rel=1e-5)
        assert found.bound <= best * (1 + 1e-9)
