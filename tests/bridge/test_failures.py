"""What is said of a failed quantization, and what is raised."""

import pytest

from lightning_caq.bridge.failures import failures_reported


def test_a_failure_is_a_warning_where_training_shall_go_on():
    with pytest.warns(UserWarning, match="failed .KeyError: 'x'.; training goes on"), failures_reported("warn"):
        raise KeyError("x")


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_failure_is_raised_otherwise(error):
    with pytest.raises(error), failures_reported("raise"):
        raise error


def test_ctrl_c_ends_the_run_in_any_case():
    with pytest.raises(KeyboardInterrupt), failures_reported("warn"):
        raise KeyboardInterrupt
