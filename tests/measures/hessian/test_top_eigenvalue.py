"""Top eigenvalues against dense blocks in float64."""

import nets
import pytest
import torch
from dense_case import DenseCase
from every import every
from torch import nn

from lightning_caq.measures.hessian.top_eigenvalue import top_eigenvalues
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


@every("name", nets.CASES)
@every("objective", ["task", "distill"])
def test_top_eigenvalues_against_dense_blocks(name, objective):
    setup = DenseCase(name)
    loss = nets.distill_loss(setup.case) if objective == "distill" else lambda net: nets.loss_of(setup.case, net)
    blocks = setup.dense.blocks(setup.dense.hessian(loss))
    target = setup.objective(objective)
    found = top_eigenvalues(setup.net, setup.layers, target, tolerance=1e-6, dropped=0.0, max_steps=200)
    for name, block in zip(setup.names, blocks, strict=True):
        values = torch.linalg.eigvalsh(block)
        expected = float(values[values.abs().argmax()])
        assert found[name][0] == pytest.approx(expected, rel=1e-7)
        assert found[name][1] <= 1e-6 * abs(expected)


@every("name", ["cnn", "mlp", "pixels", "tied"])
@every("memory", [1, 3000])
def test_little_memory_gives_the_same(name, memory):
    setup = DenseCase(name)
    objective = setup.objective("distill")
    wide = top_eigenvalues(setup.net, setup.layers, objective)
    narrow = top_eigenvalues(setup.net, setup.layers, objective, memory=memory)
    assert narrow == {name: pytest.approx(pair, rel=1e-9, abs=1e-9) for name, pair in wide.items()}


def test_top_eigenvalue_of_a_task_may_be_negative():
    net = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    layers = find_layers(net, x)
    target = make_objective("task", net, [x], lambda net, x: -net(x).square().mean() + net(x)[0, 0] ** 2)
    assert top_eigenvalues(net, layers, target)[""][0] == pytest.approx(-6)


def test_too_few_steps_are_admitted():
    setup = DenseCase("cnn")
    found = top_eigenvalues(setup.net, setup.layers, setup.objective("task"), tolerance=1e-9, max_steps=3)
    blocks = setup.dense.blocks(setup.dense.hessian(lambda net: nets.loss_of(setup.case, net)))
    assert max(residual for _, residual in found.values()) > 1e-4
    for name, block in zip(setup.names, blocks, strict=True):
        value, residual = found[name]
        assert float((torch.linalg.eigvalsh(block) - value).abs().min()) <= residual + 1e-12


def test_a_layer_that_no_batch_reaches_has_no_curvature():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    task = make_objective("task", net, [batch], lambda net, x: net(x).square().mean())
    for target in (task, make_objective("distill", net, [batch])):
        eigenvalues = top_eigenvalues(net, layers, target)
        assert eigenvalues["idle"] == (0.0, 0.0)
        assert eigenvalues["used"][0] > 0
