"""Bisection against thresholds that are known."""

import numpy as np
from every import every

from lightning_caq.allocation.solver.bisection import smallest_passing


@every("begin", [2.0, 2.7, 4.4, 7.9])
@every("tests", [1, 2, 4, 8])
def test_what_is_found_passes_and_is_as_near_as_the_tests_allow(begin, tests):
    asked = []
    found = smallest_passing(lambda x: asked.append(x) or x >= begin, 2.0, 8.0, tests)
    assert len(asked) == tests == len(set(asked))  # every test that may be taken is
    assert found >= begin
    assert found == 8.0 or found - begin <= 6 / 2 ** (tests - 1 - tests // 3)
    assert (found == 2.0) == (begin == 2.0 and tests > 1)  # the smallest is tried where nothing has failed


def test_a_place_that_fails_by_chance_does_not_hide_smaller_ones():
    """A test that fails at the first place, 5, whatever passes below; plain bisection would end above it."""
    found = smallest_passing(lambda x: x >= 2.5 and x != 5.0, 2.0, 8.0, 8)
    assert found < 3.6


def test_with_noise_the_search_ends_lower_than_plain_bisection():
    def bisection(passes):
        low, high = 2.0, 8.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        return high

    def results(search):
        rng = np.random.default_rng(0)
        return [search(lambda x: x - 3 + rng.normal() > 0) or 8.0 for _ in range(300)]

    ours, plain = results(lambda test: smallest_passing(test, 2.0, 8.0, 8)), results(bisection)
    assert np.mean(ours) < np.mean(plain)


def test_nothing_passes():
    assert smallest_passing(lambda x: False, 2.0, 8.0, 5) is None
