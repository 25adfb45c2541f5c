"""The proposal's mean against the mean over all sign vectors."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.kappa import second_order_sensitivity
from lightning_caq.measures.layer.kappa_mean import rademacher_sensitivity
from lightning_caq.network.layers import find_layers
from lightning_caq.utilities.seeding import generator


def _blocks(net, x):
    net.eval()
    return record_blocks(net, find_layers(net, x), x)


def test_rademacher_mean_against_all_sign_vectors():
    """Its expectation is a finite sum, which 95 % intervals by Student's t hold in about as many of 200 seeds."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    (block,) = _blocks(net, x).values()
    hessians = torch.stack([torch.func.hessian(lambda z: net(z[None]).square().sum())(z).detach() for z in x])
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    expected = float((hessians @ signs.T).norm(dim=1).mean()) / 5**0.5
    found = torch.tensor([rademacher_sensitivity(block, generator(s, "r"), 8) for s in range(200)], dtype=torch.float64)
    off = (found[:, 0] - expected).abs()
    assert abs(float(found[:, 0].mean()) - expected) < 4 * float(found[:, 0].std()) / 200**0.5
    assert 0.88 <= float((off <= stats.t.ppf(0.975, 7) * found[:, 1]).double().mean()) <= 0.99
    # ... and it is no estimate of the operator norm.
    norm = max(float(torch.linalg.eigvalsh(h).abs().max()) for h in hessians)
    kappa, _ = second_order_sensitivity(block, generator(0, "kappa"), iterations=3000, tolerance=1e-9)
    assert kappa == pytest.approx(norm, rel=1e-6)
    assert expected < 0.9 * norm


def test_rademacher_mean_of_dead_units():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(-100)
    (block,) = _blocks(net, torch.randn(4, 3)).values()
    assert rademacher_sensitivity(block, generator(0, "r")) == (0.0, 0.0)
