"""Shared by all tests. Being here, it also lets every test file import the helpers of this folder (``lit``)."""

import pytest
import torch
from lit import without_figures

torch.set_num_threads(1)  # the networks are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state, so that its order in the run does not matter."""
    torch.manual_seed(0)


@pytest.fixture
def no_figures():
    """For tests of other things than figures."""
    with without_figures():
        yield
