"""Shared by all tests. Being here, it also lets every test file import the helpers of this folder (``lit``)."""

import copy

import nets
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


@pytest.fixture(scope="session")
def trained_cnn():
    """A small network that has learnt its images; for copies, since every test gets the same one."""
    torch.manual_seed(0)
    net = nets.trained(nets.small_cnn(), *nets.images(512, 0), steps=250)
    assert nets.accuracy(copy.deepcopy(net).eval(), *nets.images(400, 2)) > 0.95
    return net


@pytest.fixture
def net(trained_cnn):
    """A copy of that network."""
    return copy.deepcopy(trained_cnn)
