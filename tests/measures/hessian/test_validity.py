"""The rule by which the quadratic model is taken to hold."""

from lightning_caq.measures.hessian.validity import is_predicted, tolerated_gap


def test_half_of_the_change_and_no_less_than_noise():
    for actual in (-0.4, -1e-4, 0.0, 1e-4, 0.4, 7.0):
        expected = max(abs(actual) / 2, 1e-3)
        assert tolerated_gap(actual) == expected
        for side in (-1, 1):
            assert is_predicted(actual, actual + 0.999 * side * expected)
            assert not is_predicted(actual, actual + 1.001 * side * expected)
