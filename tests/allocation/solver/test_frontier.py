"""The frontier against scipy's convex hull of all allocations."""

import itertools

import numpy as np
import pytest
from every import every
from scipy.spatial import ConvexHull

from lightning_caq.allocation.solver.constraint import size_limit
from lightning_caq.allocation.solver.frontier import frontier
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.errors import OptionError


def _lower_left(points):
    """Corners of the hull of ``points`` that fall from the smallest usage to the least cost."""
    corners = points[ConvexHull(points).vertices]
    corners = corners[np.lexsort((corners[:, 1], corners[:, 0]))]
    chain = [corners[0]]
    for point in corners[1:]:
        if point[1] < chain[-1][1]:
            chain.append(point)
    kept = []
    for point in chain:
        while len(kept) > 1:
            (a, b), (c, d) = kept[-1] - kept[-2], point - kept[-1]
            if a * d - b * c > 1e-12:
                break
            kept.pop()
        kept.append(point)
    return np.array(kept)


@every("seed", range(30))
def test_all_corners_and_nothing_above_the_hull(seed):
    rng = np.random.default_rng(seed)
    layers, bits = int(rng.integers(2, 5)), (2, 3, 4, 8)
    weights = rng.integers(1, 40, layers)
    costs = rng.exponential(size=(layers, 4))
    usage = np.multiply.outer(weights, bits).astype(float)
    choices = [
        (sum(usage[i, c] for i, c in enumerate(choice)), sum(costs[i, c] for i, c in enumerate(choice)))
        for choice in itertools.product(range(4), repeat=layers)
    ]
    expected = _lower_left(np.array(choices))
    found = np.array([(p.usage["size"], p.cost) for p in frontier(costs, usage, bits)])
    for corner in expected:
        assert np.isclose(found, corner).all(1).any()
    on_hull = np.interp(found[:, 0], expected[:, 0], expected[:, 1])
    np.testing.assert_allclose(found[:, 1], on_hull, rtol=1e-9, atol=1e-12)


def test_points_fall_and_are_optimal_at_their_size():
    rng = np.random.default_rng(1)
    bits, weights = (2, 3, 4, 5, 6, 8), rng.integers(10, 10**5, 40)
    costs = np.multiply.outer(weights * rng.lognormal(0, 2, 40), 0.25 ** np.array(bits))
    usage = np.multiply.outer(weights, bits)
    points = frontier(costs, usage, bits)
    assert len(points) == 40 * 5 + 1  # convex costs: every step of every layer
    sizes, totals = np.array([p.usage["size"] for p in points]), np.array([p.cost for p in points])
    assert (np.diff(sizes) > 0).all()
    assert (np.diff(totals) < 0).all()
    assert (np.diff(np.diff(totals) / np.diff(sizes)) > -1e-9 * totals[0]).all()
    assert points[0].bits == (2,) * 40
    assert points[-1].bits == (8,) * 40
    for point in points[::20]:
        best = solve(costs, bits, [size_limit(weights.tolist(), bits, point.usage["size"])])
        assert point.cost == pytest.approx(best.cost, rel=1e-6)
        assert point.gap == 0


def test_exact_optima_between_the_corners():
    costs, usage = [[4.0, 3.5, 0.0]], [[2.0, 3.0, 4.0]]
    assert [p.bits for p in frontier(costs, usage, (2, 3, 4))] == [(2,), (4,)]
    between = frontier(costs, usage, (2, 3, 4), limits=[3.0, 3.5, 4.0])
    assert [p.bits for p in between] == [(2,), (3,), (4,)]
    assert between[1].gap == pytest.approx(1.5)  # the relaxation mixes the two others


def test_layers_that_more_bits_do_not_help():
    assert [p.bits for p in frontier([[1.0, 1.0], [2.0, 1.0]], [[2, 4]] * 2, (2, 4))] == [(2, 2), (2, 4)]


def test_a_tie_at_the_smallest_usage_goes_to_the_cheaper():
    assert frontier([[3.0, 1.0]], [[2.0, 2.0]], (2, 4))[0].bits == (4,)


def test_bad_input():
    with pytest.raises(OptionError, match="they must be the same"):
        frontier([[1.0, 0.0]], [[2, 4]] * 2, (2, 4))
    with pytest.raises(OptionError, match="finite; row 0"):
        frontier([[np.nan, 0.0]], [[2, 4]], (2, 4))
