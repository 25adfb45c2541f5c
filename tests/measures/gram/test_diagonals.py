"""Gauss–Newton diagonals against analytic matrices in float64."""

import nets
import pytest
import torch
from dense_case import DenseCase
from every import every
from torch import nn

from lightning_caq.measures.gram.diagonals import gauss_newton_diagonals
from lightning_caq.network.layers import find_layers


@every("name", nets.CASES)
def test_gauss_newton_diagonals_against_the_analytic_matrix(name):
    setup = DenseCase(name)
    matrix = nets.gauss_newton(setup.case, setup.dense)
    found, kept = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.0)
    assert kept == pytest.approx(1)
    for layer, (name, expected) in zip(setup.layers, setup.parts(matrix.diag()).items(), strict=True):
        assert found[name].shape == layer.shape
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["cnn", "mlp", "pixels", "tied"])
@pytest.mark.parametrize("memory", [1, 3000])
def test_little_memory_gives_the_same(name, memory, monkeypatch):
    monkeypatch.setattr("lightning_caq.measures.gram.diagonals._LEAST_ROWS", 5)
    setup = DenseCase(name)
    whole, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches)
    parts, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, memory=memory)
    torch.testing.assert_close(parts, whole)


def test_dropped_rows_only_lower_the_diagonal():
    setup = DenseCase("mlp")
    whole, _ = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.0)
    part, kept = gauss_newton_diagonals(setup.net, setup.layers, setup.batches, tolerance=0.3)
    assert 0.7 <= kept < 0.99
    for name in whole:
        assert bool((part[name] <= whole[name] * (1 + 1e-12)).all())
        assert float(part[name].sum()) < float(whole[name].sum())


def test_drawn_rows_give_the_diagonal_in_the_mean():
    setup = DenseCase("mlp")
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


def test_a_layer_that_no_batch_reaches_has_no_curvature():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()
    net.forward = lambda x: net["used"](x)
    batch = torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, batch)
    assert not gauss_newton_diagonals(net, layers, [batch])[0]["idle"].any()
