"""Leading pairs of a network with batch-norm against its dense Hessian, and the curvature that they leave."""

import nets
import pytest
import torch
from torch import nn

from lightning_caq.measures.hessian.leading_pairs import folded_hessian, leading_pairs, residual_curvature
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


def test_pairs_and_the_mean_curvature_outside_them():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    nets.shake_batchnorm(net)
    net.eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    case = nets.Case(net, [x])
    dense = nets.Dense(net, [layer.name for layer in layers])
    values = torch.linalg.eigvalsh(dense.hessian(lambda f: nets.loss_of(case, f)))
    values = values[values.abs().argsort(descending=True)]
    target = make_objective("task", net, [x], lambda model, batch: nets.task_loss(model(batch)))
    with differentiable(net, layers), folded_hessian(net, layers, target) as hessian:
        pairs = leading_pairs(hessian, 4, seed=0)
        assert "forward" in vars(net[1])  # folded for as long as it is in use
        every = leading_pairs(hessian, 100, seed=0)
    assert "forward" not in vars(net[1])
    assert pairs.values.tolist() == pytest.approx(values[:4].tolist(), rel=1e-3)
    assert len(every.values) == len(values) == 24
    trace = float(values.sum())
    expected = max(float(values[4:].sum()), 0) / 20
    assert residual_curvature(trace, pairs.values, 24) == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert residual_curvature(10.0, torch.ones(4), 24) == pytest.approx(0.3)
    assert residual_curvature(3.0, torch.ones(4), 24) == 0.0
