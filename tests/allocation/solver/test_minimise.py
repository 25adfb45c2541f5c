"""What the solver is made of: dropping choices, units of limits, the search of the core and HiGHS behind it."""

import itertools

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.solver import core
from lightning_caq.allocation.solver.constraint import Constraint, size_limit
from lightning_caq.allocation.solver.core import search_core
from lightning_caq.allocation.solver.dual import best_multipliers
from lightning_caq.allocation.solver.greedy import greedy
from lightning_caq.allocation.solver.highs import solve_by_highs
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.allocation.solver.program import Program, make_program, without_dominated
from lightning_caq.errors import BudgetError


def _program(seed, layers=5, limits=1):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 8, (layers, 4)) / 4 if seed % 2 else rng.exponential(size=(layers, 4))
    usage = rng.integers(0, 9, (limits, layers, 4)).astype(float)
    usage -= usage.min(2, keepdims=True)
    return Program(costs, usage, np.floor(usage.max(2).sum(1) * rng.uniform(0.2, 0.8)))


def _least(program):
    """The least cost of all choices that keep the limits, infinite if there is none."""
    choices = (np.array(c) for c in itertools.product(range(4), repeat=len(program.costs)))
    return min((program.cost(c) for c in choices if program.fits(c)), default=np.inf)


@every("seed", range(40))
def test_dominated_choices_are_not_missed(seed):
    program = _program(seed, layers=4, limits=1 + seed % 2)
    fewer = without_dominated(program)
    assert _least(fewer) == _least(program)
    for row, kept in enumerate(np.isfinite(fewer.costs)):
        tables = np.concatenate([program.costs[None], program.usage])[:, row]
        for mine in range(4):
            others = [o for o in range(4) if (tables[:, o] <= tables[:, mine]).all() and o != mine]
            better = [o for o in others if (tables[:, o] < tables[:, mine]).any() or o < mine]
            assert kept[mine] == (not better)


@every("seed", range(60))
def test_the_core_holds_the_optimum(seed):
    program = without_dominated(_program(seed))
    price = float(best_multipliers(program)[0])
    found = search_core(program, price, 1e-12)
    assert found.cost == pytest.approx(_least(program), abs=1e-11)
    assert program.fits(found.columns)
    assert found.cost - found.bound <= 2e-12
    quick = greedy(program, np.array([price]))
    assert program.fits(quick.columns)
    assert program.lagrangian(np.array([price])) - 1e-12 <= found.cost <= quick.cost + 1e-12


@every("seed", range(30))
@every("limits", [1, 2, 3])
def test_highs_agrees(seed, limits):
    program = _program(seed, limits=limits)
    least = _least(program)
    if np.isinf(least):
        with pytest.raises(BudgetError, match="No choice keeps all limits together"):
            solve_by_highs(program)
        return
    found = solve_by_highs(program)
    assert program.fits(found.columns)
    assert found.cost == pytest.approx(least, abs=2e-6)
    assert found.bound <= least


@pytest.mark.parametrize("states", [1, 3])
def test_a_search_that_gives_up_leaves_it_to_highs(states, monkeypatch):
    rng, bits = np.random.default_rng(0), (2, 3, 4, 8)
    weights = (10 ** rng.uniform(1, 6, 40)).astype(int)
    costs = np.multiply.outer(weights * rng.lognormal(0, 2, 40), 0.25 ** np.array(bits))
    costs *= rng.uniform(0.5, 1.5, costs.shape)
    size = size_limit(weights.tolist(), bits, float(3 * weights.sum()))
    best = solve(costs, bits, [size])
    monkeypatch.setattr(core, "_STATES", states)
    program = make_program(costs / best.cost, [size])
    cut = search_core(program, float(best_multipliers(program)[0]), 1e-8)
    assert cut.cost - cut.bound > 1e-6  # no proof
    again = solve(costs, bits, [size])
    assert again.cost == pytest.approx(best.cost, rel=2e-6)
    assert best.bound <= again.cost * (1 + 1e-9)
    assert again.bound <= best.cost * (1 + 1e-9)


def test_units_of_limits():
    whole = make_program(np.zeros((2, 2)), [Constraint("size", [[600, 1000], [0, 200]], 1399)])
    assert whole.usage.tolist() == [[[0, 2], [0, 1]]]
    assert whole.limits.tolist() == [3]  # 799 of 200 each
    broken = make_program(np.zeros((1, 2)), [Constraint("energy", [[0.25, 0.6]], 0.5)])
    assert broken.usage[0, 0, 1] > broken.limits[0] == pytest.approx(1000)
    forbidden = make_program(np.array([[np.inf, 1.0]]), [Constraint("size", [[2, 4]], 3)])
    assert forbidden.limits[0] < 0


def test_multipliers_of_several_limits_give_the_linear_optimum():
    """Two limits that are the same: any share of one price is right, and the bound that of one limit."""
    for seed in range(20):
        program = _program(seed)
        twice = Program(program.costs, program.usage.repeat(2, 0), program.limits.repeat(2))
        one, two = best_multipliers(program), best_multipliers(twice)
        assert (two >= 0).all()
        assert twice.lagrangian(two) == pytest.approx(program.lagrangian(one), rel=1e-6, abs=1e-9)


def test_usage_of_very_different_sizes_under_several_limits():
    size = size_limit([10, 10], (2, 4), 60)
    seconds = Constraint("latency", [[1e-9, 1e9], [1e-9, 2e-9]], 3e-9, "s")  # all but used up by the smallest choice
    found = solve([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size, seconds])
    assert (found.bits, found.cost) == ((2, 4), 5.0)
    assert found.bound == pytest.approx(5.0, rel=1e-5)
    tight = Constraint("latency", [[1e-9, 1e9], [1e-9, 1e-3]], 2e-9, "s")
    assert solve([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size, tight]).bits == (2, 2)
