"""Branch and bound by HiGHS against the best of all choices."""

import itertools

import numpy as np
import pytest
from programs import least_cost, random_program

from lightning_caq.allocation.solver.branch_and_bound import branch_and_bound
from lightning_caq.errors import BudgetError


def test_is_the_best_of_all_choices():
    for seed, limits in itertools.product(range(30), (1, 2, 3)):
        program = random_program(seed, limits=limits)
        least = least_cost(program)
        if np.isinf(least):
            with pytest.raises(BudgetError, match="No choice keeps all limits together"):
                branch_and_bound(program)
            continue
        found = branch_and_bound(program)
        assert program.fits(found.columns)
        assert found.cost == pytest.approx(least, abs=2e-6)
        assert found.bound <= least
