"""The objective of rounded networks against networks that are rounded by hand."""

import copy
from itertools import product

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounded_loss import loss_change, rounded_loss
from lightning_caq.network.layers import find_layers
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


@every("name", nets.CASES)
def test_loss_change_and_the_weight_is_put_back(name):
    case = nets.make_case(name)
    objective = make_objective("distill", case.net, case.batches)
    layer = find_layers(case.net, case.batches[0])[0]
    weight = case.net.get_submodule(layer.name).weight
    before, delta = weight.detach().clone(), 0.2 * torch.randn(layer.shape, dtype=torch.float64)
    dense = nets.Dense(case.net, [layer.name])
    expected = nets.distill_loss(case)(dense.call(dense.vector + delta.flatten()))
    found = loss_change(case.net, layer, objective, delta, 0.0)
    assert found == pytest.approx(float(expected.detach()), rel=1e-9)
    assert torch.equal(weight, before)
