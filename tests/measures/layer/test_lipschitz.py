"""L against singular values of dense matrices, built column by column."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.lipschitz import lipschitz
from lightning_caq.network.layers import find_layers
from lightning_caq.utilities.seeding import generator


def _lipschitz(net, x, **kwargs):
    net.eval()
    (block,) = record_blocks(net, find_layers(net, x), x).values()
    return lipschitz(block, generator(0, "L"), **kwargs)


@every("dtype", [torch.float64, torch.float32])
@every("name", nets.CONVOLUTIONS)
def test_convolutions_as_operators_on_images(name, dtype):
    make, shape = nets.CONVOLUTIONS[name]
    module = make().double()
    matrix = nets.dense_operator(lambda z: module(z) - module(torch.zeros_like(z)), shape)
    value, tolerance = _lipschitz(nn.Sequential(module.to(dtype)), torch.randn(3, *shape, dtype=dtype))
    expected = float(torch.linalg.svdvals(matrix)[0])
    assert tolerance <= 1e-4
    # Half the relative residual of σ² bounds the relative error of σ.
    assert value == pytest.approx(expected, rel=0.5 * tolerance + 1e-5)


def test_the_reshaped_kernel_is_another_number():
    """The test above would pass for no kernel matrix: that one is smaller than the operator."""
    conv = nn.Conv2d(2, 3, 3, padding=1)
    value, _ = _lipschitz(nn.Sequential(conv), torch.randn(1, 2, 8, 8))
    assert value > 1.2 * float(torch.linalg.svdvals(conv.weight.detach().flatten(1))[0])


def test_linear_layers_on_tokens_and_what_follows():
    net = nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(2.0))
    value, _ = _lipschitz(net, torch.randn(2, 3, 5))
    assert value == pytest.approx(2 * float(torch.linalg.svdvals(net[0].weight.detach())[0]), rel=1e-4)


def test_batchnorm_scales():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    nets.shake_batchnorm(net)
    value, _ = _lipschitz(net, torch.randn(6, 5))
    scale = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).abs().max()
    assert value == pytest.approx(float(torch.linalg.svdvals(net[0].weight.detach())[0] * scale.detach()), rel=1e-4)


def test_embedding_as_a_matrix_on_one_hot_words():
    net = nn.Sequential(nn.Embedding(9, 4))
    value, _ = _lipschitz(net, torch.randint(0, 9, (3, 2)))
    assert value == pytest.approx(float(torch.linalg.svdvals(net[0].weight.detach())[0]), rel=1e-4)


def test_zero_weights():
    net = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(net[0].weight)
    assert _lipschitz(net, torch.randn(2, 3)) == (0.0, 0.0)


def test_hooks_are_not_part_of_the_layer():
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    plain = _lipschitz(net, x)
    net[0].register_forward_hook(lambda module, args, output: 5 * output)
    assert _lipschitz(net, x) == plain
