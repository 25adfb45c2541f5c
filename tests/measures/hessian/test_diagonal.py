"""Fisher diagonals against the gradients of single samples in float64."""

import nets
import pytest
import torch
from dense_case import DenseCase
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.measures.hessian.diagonal import fisher_diagonals
from lightning_caq.measures.hessian.gradient_norm import gradient_norms
from lightning_caq.network.batches import take_samples
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


@every("name", nets.CASES)
def test_fisher_diagonals_are_the_mean_of_squared_gradients_of_single_samples(name):
    setup = DenseCase(name)
    total = torch.zeros_like(setup.dense.vector)
    samples = sum(len(next(iter(b.values())) if isinstance(b, dict) else b) for b in setup.batches)
    for s in range(samples):
        total += setup.gradient(nets.Case(setup.net, take_samples(setup.batches, 1, skip=s))).square() / samples
    found = fisher_diagonals(setup.net, setup.layers, setup.objective("task"))
    for layer, (name, expected) in zip(setup.layers, setup.parts(total).items(), strict=True):
        assert found[name].shape == layer.shape
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-9, atol=1e-14)
        # By Jensen's inequality no mean gradient has larger squares.
        assert float(found[name].sum()) >= gradient_norms(setup.net, setup.layers, setup.objective("task"))[name] ** 2


def test_fisher_says_what_is_wrong():
    setup = DenseCase("mlp")
    with pytest.raises(OptionError, match="gauss_newton_diagonals"):
        fisher_diagonals(setup.net, setup.layers, setup.objective("distill"))
    setup.batches[1][2] = float("nan")
    with pytest.raises(CalibrationError, match="Sample 2 of calibration batch 1"):
        fisher_diagonals(setup.net, setup.layers, setup.objective("task"))


def test_a_layer_that_no_batch_reaches_has_no_fisher_information():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    task = make_objective("task", net, [batch], lambda net, x: net(x).square().mean())
    assert not fisher_diagonals(net, layers, task)["idle"].any()
