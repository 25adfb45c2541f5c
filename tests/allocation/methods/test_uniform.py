"""Even budgets."""

from method_rows import BITS, cheapest, row

from lightning_caq.profile import CurvatureProfile


def test_uniform_gives_whole_budgets_to_every_layer():
    profile = CurvatureProfile(tuple(row(str(n), n) for n in (10, 1000, 37, 4096)))
    for b in BITS:
        assert set(cheapest("uniform", profile, b)) == {b}
    even = CurvatureProfile(tuple(row(str(i)) for i in range(4)))
    assert sorted(cheapest("uniform", even, 3.0)) == [2, 2, 4, 4]
