"""Search spaces and search methods against every allocation there is."""

from itertools import product

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.budget import Ratio
from lightning_caq.allocation.methods import get_method
from lightning_caq.allocation.methods.evolution import EVALUATIONS
from lightning_caq.allocation.methods.random_search import DRAWS
from lightning_caq.allocation.search import SearchSpace, search_space
from lightning_caq.allocation.solver.constraint import bops_limit, size_limit
from lightning_caq.errors import BudgetError
from lightning_caq.profile import CurvatureProfile
from lightning_caq.sizes import LayerSizes

BITS = (2, 3, 4, 8)
WEIGHTS = (100, 37, 250, 10)
LIMIT = 3.5 * sum(WEIGHTS)


def _space(limit=LIMIT):
    return search_space([size_limit(WEIGHTS, BITS, limit)], BITS)


def _feasible():
    return [bits for bits in product(BITS, repeat=4) if sum(n * b for n, b in zip(WEIGHTS, bits, strict=True)) <= LIMIT]


def _cost(bits):
    return sum(c * 0.25**b for c, b in zip((1.0, 30.0, 2.0, 500.0), bits, strict=True))


def test_fits_exactly_what_the_budget_allows():
    space = _space()
    assert [bits for bits in product(BITS, repeat=4) if space.fits(bits)] == _feasible()
    assert _space(4 * sum(WEIGHTS)).fits((4, 4, 4, 4))  # a limit that is met to the last bit


def test_two_constraints():
    macs, inputs = (10, 5000, 20, 7), (8, 8, 4, 4)
    constraints = [size_limit(WEIGHTS, BITS, LIMIT), bops_limit(macs, inputs, BITS, 130_000)]
    space = search_space(constraints, BITS)
    bops = lambda bits: sum(m * b * a for m, b, a in zip(macs, bits, inputs, strict=True))  # noqa: E731
    for bits in product(BITS, repeat=4):
        assert space.fits(bits) == (bits in _feasible() and bops(bits) <= 130_000)


@every("quantizer", ["series", "dorefa", "codebook", "lq_nets"])
def test_tables_of_values_count_as_the_budget_counts_them(quantizer):
    sizes = LayerSizes((900, 1600, 400), (16, 32, 10), quantizer=quantizer)
    for target in ((2, 2, 2), (3, 3, 3), (2, 3, 4)):
        space = search_space(Ratio(sizes.ratio(target)).constraints(sizes, BITS), BITS)
        for bits in product(BITS, repeat=3):
            assert space.fits(bits) == (sizes.ratio(bits) >= sizes.ratio(target) * (1 - 1e-12))


def test_steps_by_hand():
    space = _space()
    assert space.lower((2, 8, 4, 3)) == {1: (2, 4, 4, 3), 2: (2, 8, 3, 3), 3: (2, 8, 4, 2)}
    assert space.higher((2, 8, 4, 3)) == {0: (3, 8, 4, 3), 2: (2, 8, 8, 3), 3: (2, 8, 4, 4)}


def test_draws_fit_leave_no_room_and_differ():
    space, rng = _space(), np.random.default_rng(0)
    draws = [space.draw(rng) for _ in range(300)]
    full = {b for b in _feasible() if not any(space.fits(up) for up in space.higher(b).values())}
    assert set(draws) == full  # every such allocation comes up


def test_settling_spares_the_layer_that_is_kept():
    space, rng = _space(), np.random.default_rng(0)
    for _ in range(50):
        assert space.settle((8, 8, 8, 8), rng, kept=1)[1] == 8
        assert space.settle((2, 2, 2, 2), rng, kept=3)[3] == 2
    tight = search_space([size_limit(WEIGHTS, BITS, 2 * sum(WEIGHTS) + 60)], BITS)
    assert tight.settle((2, 2, 8, 2), rng, kept=2)[2] == 2  # the others cannot make that much room


def test_a_pinned_layer_stays():
    space = SearchSpace(((8,), BITS, BITS, BITS), np.array([WEIGHTS], dtype=float), np.array([5.0 * sum(WEIGHTS)]))
    for method in ("random_search", "evolution"):
        assert get_method(method).search(CurvatureProfile(()), space, _cost, 0)[0] == 8


def test_a_budget_that_nothing_meets():
    with pytest.raises(BudgetError, match="smallest choice of bits takes 794, the budget allows 700"):
        _space(700)


@every(("method", "most"), [("random_search", DRAWS), ("evolution", EVALUATIONS)])
def test_the_best_that_was_tried_is_returned(method, most):
    calls = []

    def evaluate(bits):
        calls.append(bits)
        return _cost(bits)

    found = get_method(method).search(CurvatureProfile(()), _space(), evaluate, 0)
    assert _cost(found) == min(map(_cost, calls))
    assert 5 <= len(calls) <= most
    assert all(map(_space().fits, calls))


def test_evolution_finds_the_optimum_of_a_small_space():
    found = get_method("evolution").search(CurvatureProfile(()), _space(), _cost, 0)
    assert _cost(found) == min(map(_cost, _feasible()))


def _uneven(bits):
    return sum(10 ** (i % 4) * 0.25**b for i, b in enumerate(bits))


def test_evolution_beats_random_draws_in_a_large_space():
    space = search_space([size_limit([10] * 20, BITS, 3 * 200)], BITS)
    for seed in range(3):
        evolved, drawn = (
            get_method(m).search(CurvatureProfile(()), space, _uneven, seed) for m in ("evolution", "random_search")
        )
        assert _uneven(evolved) < 0.8 * _uneven(drawn)


@every("method", ["random_search", "evolution"])
def test_a_seed_repeats_a_search(method):
    space = search_space([size_limit([10] * 20, BITS, 3 * 200)], BITS)
    first, again, other = (get_method(method).search(CurvatureProfile(()), space, _uneven, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(type(b) is int for b in first)


@every("method", ["random_search", "evolution"])
def test_a_space_of_one(method):
    space = search_space([size_limit([10, 10], (4,), 80)], (4,))
    assert get_method(method).search(CurvatureProfile(()), space, lambda bits: 0.0, 0) == (4, 4)
