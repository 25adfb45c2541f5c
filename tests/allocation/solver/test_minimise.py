"""The solver as a whole where its parts hand over to each other."""

import numpy as np
import pytest

from lightning_caq.allocation.solver import dynamic_programming
from lightning_caq.allocation.solver.constraint import Constraint, size_limit
from lightning_caq.allocation.solver.dynamic_programming import search_core
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.allocation.solver.lagrangian import best_multipliers
from lightning_caq.allocation.solver.program import make_program


@pytest.mark.parametrize("states", [1, 3])
def test_a_search_that_gives_up_leaves_it_to_branch_and_bound(states, monkeypatch):
    rng, bits = np.random.default_rng(0), (2, 3, 4, 8)
    weights = (10 ** rng.uniform(1, 6, 40)).astype(int)
    costs = np.multiply.outer(weights * rng.lognormal(0, 2, 40), 0.25 ** np.array(bits))
    costs *= rng.uniform(0.5, 1.5, costs.shape)
    size = size_limit(weights.tolist(), bits, float(3 * weights.sum()))
    best = solve(costs, bits, [size])
    monkeypatch.setattr(dynamic_programming, "_STATES", states)
    program = make_program(costs / best.cost, [size])
    cut = search_core(program, float(best_multipliers(program)[0]), 1e-8)
    assert cut.cost - cut.bound > 1e-6  # no proof
    again = solve(costs, bits, [size])
    assert again.cost == pytest.approx(best.cost, rel=2e-6)
    assert best.bound <= again.cost * (1 + 1e-9)
    assert again.bound <= best.cost * (1 + 1e-9)


def test_usage_of_very_different_sizes_under_several_limits():
    size = size_limit([10, 10], (2, 4), 60)
    seconds = Constraint("latency", [[1e-9, 1e9], [1e-9, 2e-9]], 3e-9, "s")  # all but used up by the smallest choice
    found = solve([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size, seconds])
    assert (found.bits, found.cost) == ((2, 4), 5.0)
    assert found.bound == pytest.approx(5.0, rel=1e-5)
    tight = Constraint("latency", [[1e-9, 1e9], [1e-9, 1e-3]], 2e-9, "s")
    assert solve([[4.0, 1.0], [9.0, 1.0]], (2, 4), [size, tight]).bits == (2, 2)
