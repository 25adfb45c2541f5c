"""Bisection against thresholds that are known."""

from every import every

from lightning_caq.allocation.solver.bisection import smallest_passing


@every("begin", [2.0, 2.7, 4.4, 7.9])
@every("tests", [1, 2, 4, 8])
def test_what_is_found_passes_and_is_as_near_as_the_tests_allow(begin, tests):
    asked = []
    found = smallest_passing(lambda x: asked.append(x) or x >= begin, 2.0, 8.0, tests)
    assert len(asked) == tests == len(set(asked))  # every test that may be taken is
    assert found >= begin
    assert found == 8.0 or found - begin <= 6 / 2 ** (tests - 1)
    assert (found == 2.0) == (begin == 2.0 and tests > 1)  # the smallest is tried where nothing has failed


def test_nothing_passes():
    assert smallest_passing(lambda x: False, 2.0, 8.0, 5) is None
