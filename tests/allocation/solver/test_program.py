"""Multiple-choice problems in the form that solvers take: dropping choices, and the units of limits."""

import numpy as np
import pytest
from programs import least_cost, random_program

from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.allocation.solver.program import make_program, without_dominated


def test_dominated_choices_are_not_missed():
    for seed in range(40):
        program = random_program(seed, layers=4, limits=1 + seed % 2)
        fewer = without_dominated(program)
        assert least_cost(fewer) == least_cost(program)
        for row, kept in enumerate(np.isfinite(fewer.costs)):
            tables = np.concatenate([program.costs[None], program.usage])[:, row]
            for mine in range(4):
                others = [o for o in range(4) if (tables[:, o] <= tables[:, mine]).all() and o != mine]
                better = [o for o in others if (tables[:, o] < tables[:, mine]).any() or o < mine]
                assert kept[mine] == (not better)


def test_units_of_limits():
    whole = make_program(np.zeros((2, 2)), [Constraint("size", [[600, 1000], [0, 200]], 1399)])
    assert whole.usage.tolist() == [[[0, 2], [0, 1]]]
    assert whole.limits.tolist() == [3]  # 799 of 200 each
    broken = make_program(np.zeros((1, 2)), [Constraint("energy", [[0.25, 0.6]], 0.5)])
    assert broken.usage[0, 0, 1] > broken.limits[0] == pytest.approx(1000)
    forbidden = make_program(np.array([[np.inf, 1.0]]), [Constraint("size", [[2, 4]], 3)])
    assert forbidden.limits[0] < 0
