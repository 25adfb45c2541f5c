"""Multipliers of several limits against those of one."""

import pytest
from programs import random_program

from lightning_caq.allocation.solver.lagrangian import best_multipliers
from lightning_caq.allocation.solver.program import Program


def test_multipliers_of_several_limits_give_the_linear_optimum():
    """Two limits that are the same: any share of one price is right, and the bound that of one limit."""
    for seed in range(20):
        program = random_program(seed)
        twice = Program(program.costs, program.usage.repeat(2, 0), program.limits.repeat(2))
        one, two = best_multipliers(program), best_multipliers(twice)
        assert (two >= 0).all()
        assert twice.lagrangian(two) == pytest.approx(program.lagrangian(one), rel=1e-6, abs=1e-9)
