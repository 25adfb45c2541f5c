"""The objective of rounded networks, and magnitudes, against networks that are rounded by hand."""

import copy
from itertools import product

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.magnitudes import output_norm, weight_range
from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounded_loss import rounded_loss
from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.quantizers.grids.affine import fit_grid


@every("name", ["mlp", "cnn", "tied", "dict"])
def test_loss_of_networks_that_are_rounded_by_hand(name):
    case = nets.make_case(name)
    case.net.requires_grad_(False)
    layers = find_layers(case.net, case.batches[0])
    loss = rounded_loss(case.net, layers, make_objective("distill", case.net, case.batches), (2, 4))
    expected = nets.distill_loss(case)
    before = copy.deepcopy(case.net.state_dict())
    for bits in product((2, 4), repeat=len(layers)):
        rounded = copy.deepcopy(case.net)
        for layer, b in zip(layers, bits, strict=True):
            weight = rounded.get_submodule(layer.name).weight
            weight.copy_(fit_grid(weight, b, layer.channel_shape).nearest(weight))
        assert loss(bits) == pytest.approx(float(expected(rounded)), rel=1e-9)
    assert all(torch.equal(before[key], value) for key, value in case.net.state_dict().items())


def test_a_choice_is_evaluated_once():
    net, x, calls = nn.Linear(4, 2), torch.randn(8, 4), []

    def task(model, batch):
        calls.append(1)
        return model(batch).square().mean()

    loss = rounded_loss(net, find_layers(net, x), make_objective("task", net, [x], task), (2, 4))
    assert loss((2,)) == loss((2,)) != loss((4,))
    assert len(calls) == 2


def test_the_weights_are_put_back_after_a_failure():
    net, x = nn.Linear(4, 2), torch.randn(8, 4)
    before = net.weight.detach().clone()

    def task(model, batch):
        raise RuntimeError("no memory")

    loss = rounded_loss(net, find_layers(net, x), make_objective("task", net, [x], task), (2, 4))
    with pytest.raises(RuntimeError, match="no memory"):
        loss((2,))
    assert torch.equal(net.weight, before)


def test_output_norm_is_that_of_the_layer_and_what_follows():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(6, 3)
    blocks = record_blocks(net, find_layers(net, x), x)
    for name, end in (("0", 2), ("2", 3)):
        expected = net[:end](x).detach().square().sum(1).mean().sqrt()
        assert output_norm(blocks[name]) == pytest.approx(float(expected))


def test_output_norm_of_a_table_is_that_of_a_word():
    table = nn.Embedding(5, 3)
    tokens = torch.randint(0, 5, (4, 7))
    norm = output_norm(record_blocks(table, find_layers(table, tokens), tokens)[""])
    assert norm == pytest.approx(float(table(tokens).detach().flatten(0, 1).square().sum(1).mean().sqrt()))


@every(("kind", "axis"), [("conv2d", 0), ("conv_transpose2d", 1)])
def test_range_is_by_output_channel(kind, axis):
    net = nn.Conv2d(2, 3, 2) if axis == 0 else nn.ConvTranspose2d(2, 3, 2)
    weight = net.weight.detach().numpy()
    others = tuple(d for d in range(4) if d != axis)
    expected = ((weight.max(others) - weight.min(others)) ** 2).mean() ** 0.5
    assert weight_range(net, Layer("", kind, tuple(weight.shape))) == pytest.approx(float(expected), rel=1e-6)


def test_what_the_baselines_need_is_in_the_profile():
    """KL with one layer rounded, and the norm of the scores, √tr(H_ii), against the dense network in float64."""
    case = nets.make_case("cnn")
    layers = find_layers(case.net, case.batches[0])
    needs = frozenset({"kl", "gradient_norm"})
    profile = measure(case.net, case.batches, layers=layers, needs=needs, bits=(2, 4))
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    blocks = dense.blocks(nets.gauss_newton(case, dense))
    loss = nets.distill_loss(case)
    for layer, row, block in zip(layers, profile.layers, blocks, strict=True):
        assert row.score_norm == pytest.approx(float(block.trace()) ** 0.5, rel=1e-3)
        for b in (2, 4):
            rounded = copy.deepcopy(case.net)
            weight = rounded.get_submodule(layer.name).weight.data
            weight.copy_(fit_grid(weight, b, layer.channel_shape).nearest(weight))
            assert row.kl[b] == pytest.approx(float(loss(rounded).detach()), rel=1e-9)
    task = measure(
        case.net, case.batches, layers=layers, needs=frozenset({"gradient_norm"}), bits=(2, 4),
        objective="task", loss_fn=lambda net, batch: nets.task_loss(net(batch)),
    )  # fmt: skip
    assert all(row.score_norm is None for row in task.layers)
