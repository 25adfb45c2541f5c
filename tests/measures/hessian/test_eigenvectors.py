"""The quadratic model against dense Hessians in float64."""

import nets
import pytest
import torch
from every import every

from lightning_caq.errors import OptionError
from lightning_caq.measures.hessian import eigenvectors
from lightning_caq.measures.hessian.eigenvectors import check_memory, short_axis_model
from lightning_caq.measures.measure import differentiable
from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.network.objective import make_objective

K = 4


def _model(case, objective):
    layers = find_layers(case.net, case.batches[0])
    target = make_objective(objective, case.net, case.batches, lambda net, b: nets.task_loss(case.output(net, b)))
    with differentiable(case.net, layers):
        found = short_axis_model(case.net, layers, target, K, seed=0)
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    assert list(found.sizes) == dense.sizes
    return found, dense


def _compare(found, matrix):
    values, vectors = torch.linalg.eigh(matrix)
    lead = values.abs().argsort(descending=True)[:K]
    top = float(values[lead[0]].abs())
    torch.testing.assert_close(found.values, values[lead], rtol=1e-3, atol=1e-5 * top)
    steep = vectors[:, lead] * values[lead] @ vectors[:, lead].T  # says the same whatever the signs of vectors
    v = found.vectors.double()
    torch.testing.assert_close(v * found.values @ v.T, steep, rtol=0, atol=2e-3 * top)
    torch.testing.assert_close(v.T @ v, torch.eye(len(v.T), dtype=v.dtype), rtol=0, atol=1e-4)
    return float(matrix.trace() - values[lead].sum())


@pytest.mark.parametrize("memory", [2**30, 2000])
@pytest.mark.parametrize("name", nets.CASES)
def test_distill_against_the_dense_gauss_newton_matrix(name, memory, monkeypatch):
    monkeypatch.setattr(eigenvectors, "rows_memory", lambda weight: memory)
    case = nets.make_case(name)
    found, dense = _model(case, "distill")
    rest = _compare(found, nets.gauss_newton(case, dense))
    assert found.residual == pytest.approx(rest / (sum(found.sizes) - K), rel=1e-3, abs=1e-9)
    assert not found.gradient.any()


@every("name", ["mlp", "cnn", "tied", "twice"])
def test_task_against_the_dense_hessian(name):
    case = nets.make_case(name)
    found, dense = _model(case, "task")
    matrix = dense.hessian(lambda net: nets.loss_of(case, net))
    rest = _compare(found, matrix)
    spread = float(torch.linalg.eigvalsh(matrix).abs().sum())
    assert found.residual * (len(matrix) - K) == pytest.approx(max(rest, 0.0), abs=0.1 * spread)
    gradient = dense.jacobian(lambda net: nets.loss_of(case, net))
    torch.testing.assert_close(found.gradient, gradient.float(), rtol=1e-4, atol=1e-6)


def test_too_much_memory_is_refused_with_what_would_fit(monkeypatch):
    layers = [Layer("a", "linear", (100, 30)), Layer("b", "linear", (20, 100))]
    monkeypatch.setattr(eigenvectors, "LARGEST", 4 * 5000 * 10)
    check_memory(layers, 10)
    with pytest.raises(OptionError, match=r"eigenpairs=11 holds .* for 5,000 weights.*; give eigenpairs=10 or fewer"):
        check_memory(layers, 11)
    monkeypatch.setattr(eigenvectors, "LARGEST", 4 * 5000 * 5000)
    check_memory(layers, 10**9)  # there are no more than n


def test_the_default_dtype_changes_nothing():
    case, before = nets.make_case("mlp"), torch.get_default_dtype()
    found, _ = _model(case, "distill")
    try:
        torch.set_default_dtype(torch.float64)
        again, _ = _model(case, "distill")
    finally:
        torch.set_default_dtype(before)
    assert again.vectors.dtype == torch.float32
    torch.testing.assert_close(again.values, found.values)
