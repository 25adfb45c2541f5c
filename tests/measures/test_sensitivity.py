"""Cheap sensitivities against dense gradients, Hessians and Gauss–Newton matrices in float64."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.measures.sensitivity import (
    fisher_diagonals,
    gauss_newton_diagonals,
    gradient_norms,
    quantized_kl,
    top_eigenvalues,
)
from lightning_caq.network.batches import run_model, take_samples
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


def _task(net, batch):
    output = run_model(net, batch)
    return nets.task_loss(output.movedim(1, -1).flatten(0, -2) if output.ndim == 4 else output.flatten(0, -2))


class Setup:
    def __init__(self, name):
        self.case = nets.make_case(name)
        self.case.net.requires_grad_(True)
        self.net, self.batches = self.case.net, self.case.batches
        self.layers = find_layers(self.net, self.batches[0])
        self.names = [layer.name for layer in self.layers]
        self.dense = nets.Dense(self.net, self.names)

    def objective(self, name):
        return make_objective(name, self.net, self.batches, _task)

    def parts(self, vector):
        return dict(zip(self.names, vector.split(self.dense.sizes), strict=True))

    def gradient(self, case):
        loss = lambda vector: nets.loss_of(case, self.dense.call(vector))  # noqa: E731
        return torch.func.grad(loss)(self.dense.vector).detach()


@pytest.fixture(params=nets.CASES)
def setup(request):
    return Setup(request.param)


def test_gradient_norms_are_exact_over_uneven_batches(setup):
    found = gradient_norms(setup.net, setup.layers, setup.objective("task"))
    expected = {name: float(g.norm()) for name, g in setup.parts(setup.gradient(setup.case)).items()}
    assert found == pytest.approx(expected, rel=1e-9)
    at_minimum = gradient_norms(setup.net, setup.layers, setup.objective("distill"))
    assert max(at_minimum.values()) < 1e-12


def test_fisher_diagonals_are_the_mean_of_squared_gradients_of_single_samples(setup):
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
    setup = Setup("mlp")
    with pytest.raises(OptionError, match="gauss_newton_diagonals"):
        fisher_diagonals(setup.net, setup.layers, setup.objective("distill"))
    setup.batches[1][2] = float("nan")
    with pytest.raises(CalibrationError, match="Sample 2 of calibration batch 1"):
        fisher_diagonals(setup.net, setup.layers, setup.objective("task"))


def test_gauss_newton_diagonals_against_the_analytic_matrix(setup):
    matrix = nets.gauss_newton(setup.case, setup.dense)
    found, kept = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.0)
    assert kept == pytest.approx(1)
    for layer, (name, expected) in zip(setup.layers, setup.parts(matrix.diag()).items(), strict=True):
        assert found[name].shape == layer.shape
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["cnn", "mlp", "pixels", "tied"])
@pytest.mark.parametrize("memory", [1, 3000])
def test_little_memory_gives_the_same(name, memory, monkeypatch):
    monkeypatch.setattr("lightning_caq.measures.sensitivity._LEAST_ROWS", 5)
    setup = Setup(name)
    whole, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches)
    parts, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, memory=memory)
    torch.testing.assert_close(parts, whole)
    objective = setup.objective("distill")
    wide = top_eigenvalues(setup.net, setup.layers, objective)
    narrow = top_eigenvalues(setup.net, setup.layers, objective, memory=memory)
    assert narrow == {name: pytest.approx(pair, rel=1e-9, abs=1e-9) for name, pair in wide.items()}


def test_dropped_rows_only_lower_the_diagonal():
    setup = Setup("mlp")
    whole, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.0)
    part, kept = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.3)
    assert 0.7 <= kept < 0.99
    for name in whole:
        assert bool((part[name] <= whole[name] * (1 + 1e-12)).all())
        assert float(part[name].sum()) < float(whole[name].sum())


def test_drawn_rows_give_the_diagonal_in_the_mean():
    setup = Setup("mlp")
    exact = nets.gauss_newton(setup.case, setup.dense).diag()
    draws = []
    for seed in range(200):
        found, kept = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, max_rows=9, seed=seed)
        draws.append(torch.cat([found[name].flatten() for name in setup.names]))
        assert kept == 1
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert float(((draws.mean(0) - exact).abs() / error).max()) < 4.5  # of 35 numbers
    assert float(draws.sum(1).std()) > 0


@every("objective", ["task", "distill"])
def test_top_eigenvalues_against_dense_blocks(setup, objective):
    loss = nets.distill_loss(setup.case) if objective == "distill" else lambda net: nets.loss_of(setup.case, net)
    blocks = setup.dense.blocks(setup.dense.hessian(loss))
    target = setup.objective(objective)
    found = top_eigenvalues(setup.net, setup.layers, target, tolerance=1e-6, dropped=0.0, max_steps=200)
    for name, block in zip(setup.names, blocks, strict=True):
        values = torch.linalg.eigvalsh(block)
        expected = float(values[values.abs().argmax()])
        assert found[name][0] == pytest.approx(expected, rel=1e-7)
        assert found[name][1] <= 1e-6 * abs(expected)


def test_top_eigenvalue_of_a_task_may_be_negative():
    net = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    layers = find_layers(net, x)
    target = make_objective("task", net, [x], lambda net, x: -net(x).square().mean() + net(x)[0, 0] ** 2)
    assert top_eigenvalues(net, layers, target)[""][0] == pytest.approx(-6)


def test_too_few_steps_are_admitted():
    setup = Setup("cnn")
    found = top_eigenvalues(setup.net, setup.layers, setup.objective("task"), tolerance=1e-9, max_steps=3)
    blocks = setup.dense.blocks(setup.dense.hessian(lambda net: nets.loss_of(setup.case, net)))
    assert max(residual for _, residual in found.values()) > 1e-4
    for name, block in zip(setup.names, blocks, strict=True):
        value, residual = found[name]
        assert float((torch.linalg.eigvalsh(block) - value).abs().min()) <= residual + 1e-12


def test_quantized_kl_and_the_weights_are_put_back(setup):
    deltas = {x.name: {b: 2.0**-b * torch.randn(x.shape, dtype=torch.float64) for b in (2, 4)} for x in setup.layers}
    before = setup.dense.vector.clone()
    found = quantized_kl(setup.net, setup.layers, setup.batches, deltas)
    loss = nets.distill_loss(setup.case)
    for name in setup.names:
        for b, delta in deltas[name].items():
            moved = torch.cat(
                [w.flatten() + (delta.flatten() if n == name else 0) for n, w in setup.parts(before).items()]
            )
            assert found[name][b] == pytest.approx(float(loss(setup.dense.call(moved)).detach()), rel=1e-8)
    assert torch.equal(nets.Dense(setup.net, setup.names).vector, before)


def test_a_layer_that_no_batch_reaches_has_no_sensitivity():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    task = make_objective("task", net, [batch], lambda net, x: net(x).square().mean())
    assert gradient_norms(net, layers, task)["idle"] == 0
    assert not fisher_diagonals(net, layers, task)["idle"].any()
    assert not gauss_newton_diagonals(net, layers, [batch])[0]["idle"].any()
    for target in (task, make_objective("distill", net, [batch])):
        found = top_eigenvalues(net, layers, target)
        assert found["idle"] == (0.0, 0.0)
        assert found["used"][0] > 0
    deltas = {name: {4: torch.ones(2, 3, dtype=torch.float64)} for name in ("used", "idle")}
    assert quantized_kl(net, layers, [batch], deltas)["idle"][4] == pytest.approx(0, abs=1e-12)
