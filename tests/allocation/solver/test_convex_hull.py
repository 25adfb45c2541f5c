"""Steps along hulls."""

import numpy as np

from lightning_caq.allocation.solver.convex_hull import hull_steps


def test_steps_are_in_the_order_of_their_price_and_of_their_row():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs = rng.integers(0, 5, (6, 5)).astype(float)  # many straight edges
        steps = hull_steps(costs, np.tile(np.arange(5.0), (6, 1)) * rng.integers(1, 3, (6, 1)))
        assert (np.diff(steps.price) <= 0).all()
        now = steps.start.copy()
        for row, source, target in zip(steps.row, steps.source, steps.target, strict=True):
            assert now[row] == source
            now[row] = target
        assert (costs[np.arange(6), now] == costs.min(1)).all()
