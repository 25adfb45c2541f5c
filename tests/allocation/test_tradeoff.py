"""What a profile alone says, against all allocations of a small network."""

import itertools

import numpy as np
import pytest

from lightning_caq.allocation.tradeoff import allocate, tradeoff
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature

BITS = (2, 3, 4)
WEIGHTS = (10, 30, 20)


def _profile():
    rng = np.random.default_rng(0)
    errors = -np.sort(-rng.exponential(size=(3, 3)), axis=1)
    rows = [
        LayerCurvature(f"l{i}", n, 1, n, carried_error=dict(zip(BITS, e.tolist(), strict=True)))
        for i, (n, e) in enumerate(zip(WEIGHTS, errors, strict=True))
    ]
    return CurvatureProfile(tuple(rows)), errors**2


def test_nothing_is_both_smaller_and_cheaper():
    profile, costs = _profile()
    every = {
        tuple(BITS[c] for c in choice): (np.dot(WEIGHTS, [BITS[c] for c in choice]), costs[range(3), choice].sum())
        for choice in itertools.product(range(3), repeat=3)
    }
    points = tradeoff(profile, method="caq", bits=BITS)
    assert points[0].bits == (2, 2, 2)
    assert points[-1].bits == (4, 4, 4)
    for point in points:
        size, cost = every[point.bits]
        assert (point.usage["size"], point.cost) == (size, pytest.approx(cost))
        assert cost == pytest.approx(min(c for s, c in every.values() if s <= size))
        within = allocate(profile, method="caq", bits=BITS, avg_bits=size / 60)
        assert within.cost == pytest.approx(cost)


def test_methods_that_search_have_no_costs():
    with pytest.raises(OptionError, match="searches"):
        tradeoff(_profile()[0], method="random_search", bits=BITS)
