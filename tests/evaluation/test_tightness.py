"""Tightness against numpy on linear networks, where first order is everything, and on one that is not linear."""

import copy

import nets
import numpy as np
import pytest
import torch
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.measures.measure import measure
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.studies import Tightness


def _profile(net, batches):
    return measure(net, batches, needs=frozenset({"lipschitz_amplification"}))


def test_two_linear_maps_by_hand():
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    batches = [torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)]
    found = tightness(
        net, find_layers(net, batches[0]), make_reference(net, batches), _profile(net, batches), {"0": 3, "1": 4}
    )
    x = torch.cat(batches).numpy()
    w, v = (layer.weight.detach() for layer in net)
    dw, dv = ((fit_grid(m, b, (len(m), 1)).nearest(m) - m).double().numpy() for m, b in ((w, 3), (v, 4)))
    w, v = w.numpy(), v.numpy()

    def rms(change):
        return np.sqrt(np.square(change).sum() / len(x))

    first, second = x @ dw.T @ v.T, x @ w.T @ dv.T
    inner = (first * second).sum() / len(x)
    expected = Tightness(
        observed=rms(x @ (w + dw).T @ (v + dv).T - x @ w.T @ v.T),
        bound=rms(np.linalg.norm(first, axis=1) + np.linalg.norm(second, axis=1)),
        correlated=np.sqrt(rms(first) ** 2 + rms(second) ** 2 + 2 * abs(inner)),
        rss=np.hypot(rms(first), rms(second)),
        linear=rms(first + second),
        lipschitz=np.linalg.norm(v, 2) * rms(x @ dw.T) + rms(x @ w.T @ dv.T),
    )
    for name in ("observed", "bound", "correlated", "rss", "linear"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert found.lipschitz == pytest.approx(expected.lipschitz, rel=2e-3)


def test_with_biases_the_mean_of_each_error_is_taken_out():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x = torch.randn(8, 4, dtype=torch.float64) + 3.0
    reference, profile = make_reference(net, [x]), _profile(net, [x])
    found = tightness(net, find_layers(net, x), reference, profile, {"0": 3, "1": 3})
    x, inner = x.numpy(), net[0](x).detach().numpy()
    w, v = (layer.weight.detach() for layer in net)
    dw, dv = ((fit_grid(m, 3, (len(m), 1)).nearest(m) - m).double().numpy() for m in (w, v))
    u, t = x @ dw.T, inner @ dv.T
    u, t = u - u.mean(0), t - t.mean(0)
    first, v = u @ v.numpy().T, v.numpy()

    def rms(change):
        return np.sqrt(np.square(change).sum() / len(x))

    assert found.bound == pytest.approx(rms(np.linalg.norm(first, axis=1) + np.linalg.norm(t, axis=1)), rel=1e-5)
    assert found.bound < rms(first) + rms(t)
    assert found.linear == pytest.approx(rms(first + t), rel=1e-5)
    assert found.observed == pytest.approx(rms(first + t + u @ dv.T), rel=1e-5)


def test_a_trained_network_keeps_its_state_and_the_order_of_the_predictions():
    x, y = nets.images(256, seed=0)
    net = nets.trained(nets.small_cnn(), x, y)
    batches, layers = list(x[:64].split(32)), find_layers(net, x[:2])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    profile, reference = _profile(net, batches), make_reference(copy.deepcopy(net).eval(), batches)
    for b in (4, 8):
        found = tightness(net, layers, reference, profile, {layer.name: b for layer in layers})
        assert found.lipschitz > found.bound >= found.correlated >= max(found.rss, found.linear)
        assert found.ratios["correlated"] >= 1
        assert found.ratios["linear"] == pytest.approx(1, abs=0.2 if b == 4 else 0.05)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_ratios_where_nothing_moves():
    assert Tightness(0.0, 0.0, 0.0, 0.0, 0.0).ratios == dict.fromkeys(("bound", "correlated", "rss", "linear"), 1.0)
    assert Tightness(0.0, 1.0, 1.0, 1.0, 1.0).ratios["bound"] == float("inf")


def test_without_lipschitz_constants_there_is_no_such_bound():
    net, x = nets.mlp().eval(), torch.randn(6, 4)
    layers = find_layers(net, x)
    found = tightness(
        net, layers, make_reference(net, [x]), measure(net, [x], needs=frozenset({"inputs"})), {"0": 4, "2": 4}
    )
    assert found.lipschitz is None
    assert "lipschitz" not in found.ratios


def test_missing_bits_are_named():
    net, x = nets.mlp(), torch.randn(6, 4)
    with pytest.raises(OptionError, match=r"no entry for the layers \['2'\]"):
        tightness(
            net, find_layers(net, x), make_reference(net, [x]), measure(net, [x], needs=frozenset({"inputs"})), {"0": 4}
        )
