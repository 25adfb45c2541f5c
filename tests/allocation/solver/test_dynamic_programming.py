"""Dynamic programming over the core, and the greedy choice, against the best of all choices."""

import numpy as np
import pytest
from programs import least_cost, random_program

from lightning_caq.allocation.solver.dynamic_programming import search_core
from lightning_caq.allocation.solver.greedy import greedy
from lightning_caq.allocation.solver.lagrangian import best_multipliers
from lightning_caq.allocation.solver.program import without_dominated


def test_the_core_holds_the_optimum():
    for seed in range(60):
        program = without_dominated(random_program(seed))
        price = float(best_multipliers(program)[0])
        found = search_core(program, price, 1e-12)
        assert found.cost == pytest.approx(least_cost(program), abs=1e-11)
        assert program.fits(found.columns)
        assert found.cost - found.bound <= 2e-12
        quick = greedy(program, np.array([price]))
        assert program.fits(quick.columns)
        assert program.lagrangian(np.array([price])) - 1e-12 <= found.cost <= quick.cost + 1e-12
