"""Local L against dense Jacobians of each sample."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.lipschitz import lipschitz
from lightning_caq.measures.layer.local_lipschitz import local_lipschitz
from lightning_caq.network.layers import find_layers
from lightning_caq.utilities.seeding import generator


def _lipschitz(net, x, **kwargs):
    net.eval()
    (block,) = record_blocks(net, find_layers(net, x), x).values()
    return lipschitz(block, generator(0, "L"), **kwargs)


def _local(net, x, **kwargs):
    net.eval()
    (block,) = record_blocks(net, find_layers(net, x), x).values()
    return local_lipschitz(block, generator(0, "local"), **{"iterations": 2000, "tolerance": 1e-9, **kwargs})


def _largest_jacobian(net, x):
    """By dense Jacobians of each sample by itself."""
    jacobians = [torch.func.jacrev(lambda z: net(z[None]).flatten())(z).flatten(1) for z in x]
    return max(float(torch.linalg.svdvals(j.detach())[0]) for j in jacobians)


@every("name", nets.CONVOLUTIONS)
def test_local_lipschitz_against_dense_jacobians(name):
    make, shape = nets.CONVOLUTIONS[name]
    net, x = nn.Sequential(make(), nn.Tanh()).double(), torch.randn(3, *shape, dtype=torch.float64)
    expected = _largest_jacobian(net, x)
    assert _local(net, x)[0] == pytest.approx(expected, rel=1e-4)
    value, change = local_lipschitz(
        next(iter(record_blocks(net, find_layers(net, x), x).values())), generator(0, "local")
    )
    assert 0.9 * expected < value <= expected * (1 + 1e-9)  # a lower bound at the default effort
    assert change <= 1e-3


@every("activation", [nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True), nn.LeakyReLU(3.0)])
def test_local_lipschitz_lies_below_the_certified_one(activation):
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), activation).double()
    nets.shake_batchnorm(net)
    x = torch.randn(8, 5, dtype=torch.float64)
    local, _ = _local(net, x)
    assert local == pytest.approx(_largest_jacobian(net, x), rel=1e-6)
    assert 0 < local <= _lipschitz(net, x)[0] * (1 + 1e-4)


def test_local_lipschitz_on_tokens():
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    assert _local(net, x)[0] == pytest.approx(_largest_jacobian(net, x), rel=1e-6)


def test_local_lipschitz_of_dead_units_is_zero():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(-100)
    assert _local(net, torch.randn(4, 3)) == (0.0, 0.0)


def test_local_lipschitz_of_an_embedding_is_the_largest_row_in_use():
    net, words = nn.Sequential(nn.Embedding(9, 4)), torch.tensor([[0, 3], [3, 5]])
    with torch.no_grad():
        net[0].weight[8] *= 100  # not in use
    value, change = _local(net, words)
    assert value == pytest.approx(float(net[0].weight.detach()[[0, 3, 5]].norm(dim=1).max()))
    assert (value < _lipschitz(net, words)[0], change) == (True, 0.0)


def test_local_lipschitz_of_an_embedding_with_what_follows():
    net, words = nn.Sequential(nn.Embedding(9, 4), nn.Tanh()).double(), torch.tensor([[0, 3], [3, 5]])
    rows = net[0].weight.detach()[[0, 3, 5]]
    slopes = (1 - rows.tanh().square()) * rows  # d/da tanh(a w) at a = 1
    assert _local(net, words)[0] == pytest.approx(float(slopes.norm(dim=1).max()))
