"""Small multiple-choice problems, and their optima by trying every choice."""

import itertools

import numpy as np

from lightning_caq.allocation.solver.program import Program


def random_program(seed, layers=5, limits=1):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 8, (layers, 4)) / 4 if seed % 2 else rng.exponential(size=(layers, 4))
    usage = rng.integers(0, 9, (limits, layers, 4)).astype(float)
    usage -= usage.min(2, keepdims=True)
    return Program(costs, usage, np.floor(usage.max(2).sum(1) * rng.uniform(0.2, 0.8)))


def least_cost(program):
    """The least cost of all choices that keep the limits, infinite if there is none."""
    every = (np.array(c) for c in itertools.product(range(4), repeat=len(program.costs)))
    return min((program.cost(c) for c in every if program.fits(c)), default=np.inf)
