"""Gradient norms against dense gradients in float64."""

import nets
import pytest
import torch
from dense_case import DenseCase
from every import every
from torch import nn

from lightning_caq.measures.hessian.gradient_norm import gradient_norms
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


@every("name", nets.CASES)
def test_gradient_norms_are_exact_over_uneven_batches(name):
    setup = DenseCase(name)
    found = gradient_norms(setup.net, setup.layers, setup.objective("task"))
    expected = {name: float(g.norm()) for name, g in setup.parts(setup.gradient(setup.case)).items()}
    assert found == pytest.approx(expected, rel=1e-9)
    at_minimum = gradient_norms(setup.net, setup.layers, setup.objective("distill"))
    assert max(at_minimum.values()) < 1e-12


def test_a_layer_that_no_batch_reaches_has_no_gradient():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    task = make_objective("task", net, [batch], lambda net, x: net(x).square().mean())
    assert gradient_norms(net, layers, task)["idle"] == 0
