"""Relaxations against closed forms, scipy's linear programs and dense grids."""

import itertools

import numpy as np
import pytest
from every import every
from scipy.optimize import linprog, minimize

from lightning_caq.allocation.solver.constraint import bops_limit, size_limit
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.allocation.solver.relaxation import noise_below, relax_bits, relax_table
from lightning_caq.errors import BudgetError, OptionError


def test_two_layers_by_hand():
    """Equal slopes c ln4 4^-b / n: with n = (1, 2) and c = (16, 8) the bits differ by log4(16 · 2 / 8) = 1."""
    found = relax_bits([16.0, 8.0], [1, 2], 10.0, least=0, most=16)
    second = (10.0 - 1.0) / 3
    assert found.bits == pytest.approx((second + 1, second))
    assert found.value == pytest.approx(16 * 0.25 ** (second + 1) + 8 * 0.25**second)
    assert found.prices["size"] == pytest.approx(np.log(4) * 16 * 0.25 ** (second + 1))


def test_bits_at_their_ends():
    assert relax_bits([1e9, 1.0], [1, 1], 10.0, least=2, most=8).bits == pytest.approx((8, 2))
    assert relax_bits([1.0, 0.0], [1, 1], 6.0, least=2, most=8).bits == pytest.approx((4, 2))  # nothing for no noise
    rich = relax_bits([1.0, 0.0], [1, 1], 100.0, least=2, most=8)
    assert (rich.bits, rich.prices) == ((8.0, 2.0), {"size": 0.0})
    assert relax_bits([1.0, 1.0], [1, 1], 7.0, least=[5.0, 2.0], most=8).bits == pytest.approx((5, 2))


@every("seed", range(20))
def test_real_bits_are_optimal(seed):
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 6))
    noise, weights = rng.lognormal(0, 2, layers), rng.integers(1, 20, layers)
    limit = float(weights.sum() * rng.uniform(2.5, 7.5))
    found = relax_bits(noise, weights.tolist(), limit, least=2, most=8)
    other = minimize(
        lambda b: np.log((noise * 0.25**b).sum()),
        np.full(layers, limit / weights.sum()),
        bounds=[(2, 8)] * layers,
        constraints={"type": "ineq", "fun": lambda b: limit - weights @ b},
        options={"ftol": 1e-12},
    )
    assert found.value == pytest.approx(np.exp(other.fun), rel=1e-4)
    assert weights @ found.bits <= limit * (1 + 1e-12)
    assert found.value == pytest.approx((noise * 0.25 ** np.array(found.bits)).sum())  # the dual has no gap
    more = relax_bits(noise, weights.tolist(), limit + 1e-4, least=2, most=8)
    assert (found.value - more.value) / 1e-4 == pytest.approx(found.prices["size"], rel=1e-3, abs=1e-12)


@every("seed", range(20))
def test_real_bits_certify_every_allocation(seed):
    rng = np.random.default_rng(seed)
    bits, weights = (2, 3, 4, 6), rng.integers(1, 20, 4).tolist()
    costs = np.multiply.outer(rng.lognormal(0, 2, 4), 0.25 ** np.array(bits)) * rng.uniform(0.5, 2, (4, 4))
    limit = sum(weights) * rng.uniform(2, 6)
    noise = noise_below(costs, bits)
    assert (np.multiply.outer(noise, 0.25 ** np.array(bits)) <= costs * (1 + 1e-12)).all()
    bound = relax_bits(noise, weights, limit, least=2, most=6).value
    best = solve(costs, bits, [size_limit(weights, bits, limit)]).cost
    assert bound <= best * (1 + 1e-9)


@every("seed", range(30))
def test_tables_against_a_linear_program(seed):
    rng = np.random.default_rng(seed)
    layers, bits = int(rng.integers(1, 8)), (2, 3, 5, 8)
    weights, macs = rng.integers(1, 100, layers), rng.integers(1, 100, layers)
    costs = rng.exponential(size=(layers, 4))
    constraints = [size_limit(weights.tolist(), bits, float(np.floor(weights.sum() * rng.uniform(2, 8))))]
    if seed % 2:
        constraints.append(bops_limit(macs, [8] * layers, bits, 8.0 * np.floor(macs.sum() * rng.uniform(2, 8))))
    found = relax_table(costs, bits, constraints)
    program = linprog(
        costs.ravel(),
        A_ub=np.array([each.usage.ravel() for each in constraints]),
        # Limits in what whole choices can use: both steps below divide every usage.
        b_ub=[_reachable(each) for each in constraints],
        A_eq=np.repeat(np.eye(layers), 4, axis=1),
        b_eq=np.ones(layers),
    )
    assert found.value == pytest.approx(program.fun, rel=1e-6)
    prices = np.array([found.prices[each.name] for each in constraints])
    priced = costs + sum(p * each.usage for p, each in zip(prices, constraints, strict=True))
    dual = priced.min(1).sum() - sum(p * _reachable(c) for p, c in zip(prices, constraints, strict=True))
    assert dual == pytest.approx(found.value, rel=1e-9)
    best = solve(costs, bits, constraints)
    assert found.value <= best.cost * (1 + 1e-9)
    assert best.relaxed == pytest.approx(found.value, rel=1e-6)


def _reachable(constraint):
    """The limit, rounded down to a sum that whole multiples of the common divisor can make."""
    least = constraint.usage.min(1)
    step = np.gcd.reduce((constraint.usage - least[:, None]).astype(int), axis=None)
    return least.sum() + np.floor((constraint.limit - least.sum()) / step) * step


def test_a_relaxation_never_exceeds_any_allocation():
    costs, bits, weights = [[9.0, 4.0, 0.0], [5.0, 4.5, 1.0]], (2, 3, 4), [3, 7]
    size = size_limit(weights, bits, 33)
    value = relax_table(costs, bits, [size]).value
    for choice in itertools.product(range(3), repeat=2):
        assert size.total(choice) > 33 or value <= sum(costs[i][c] for i, c in enumerate(choice))


def test_bad_input():
    with pytest.raises(BudgetError, match="least bits take 4 bits together, the budget allows 3"):
        relax_bits([1.0, 1.0], [1, 1], 3.0, least=2, most=8)
    for noise in ([-1.0, 1.0], [np.nan, 1.0], [], [1.0]):
        with pytest.raises(OptionError, match="one finite number from 0 up"):
            relax_bits(noise, [1, 1], 8.0, least=2, most=8)
    with pytest.raises(OptionError, match="leave room"):
        relax_bits([1.0], [1], 8.0, least=5, most=4)
    with pytest.raises(BudgetError, match="smallest choice takes 40 bits"):
        relax_table([[1.0, 0.0]] * 2, (2, 4), [size_limit([10, 10], (2, 4), 39)])
    with pytest.raises(OptionError, match="at least 0; row 0 is not"):
        noise_below([[-1.0, 0.0]], (2, 4))
