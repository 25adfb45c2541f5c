"""The estimate of the time: what it counts, and that it is of the right size."""

from dataclasses import replace

import nets
import pytest
import torch
from torch import nn

from lightning_caq.measures import cost, registry
from lightning_caq.measures.cost import Cost, Extent, estimate_seconds
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.registry import available_measures, required_measures, total_cost
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective

EXTENT = Extent("distill", layers=20, bits=6, eigenpairs=64, samples=256, first=128)
FREE = {"rounding_error", "distribution_distance", "output_norm"}  # no gradients worth counting


def _cost(*needs, **changed):
    measures = required_measures(needs)
    taken = frozenset().union(*(measure.names for measure in measures))
    return total_cost(measures, replace(EXTENT, needs=taken, **changed))


def test_every_measure_is_counted(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})  # a user's own may cost nothing, as the one in an example does
    for objective in ("distill", "task"):
        for need in available_measures() - FREE:
            assert _cost(need, objective=objective) != Cost(), need
        assert _cost(*FREE, objective=objective) == Cost()
        whole = _cost(*available_measures(), objective=objective)
        assert all(_cost(x, objective=objective).gradients < whole.gradients for x in available_measures())
    assert _cost("trace") == _cost("subspace")  # they come together
    assert _cost("subspace", objective="task").row_passes == 0


def test_what_grows_and_what_does_not():
    """In gradients over all samples: what looks at a part of them costs less of these where there are more."""
    kappa = _cost("kappa").gradients
    assert _cost("kappa", samples=512).gradients == kappa / 2
    assert _cost("kappa", first=1000, samples=1000) == _cost("kappa", first=256, samples=1000)
    assert _cost("lipschitz", samples=512).gradients == _cost("lipschitz").gradients / 2
    assert _cost("kl", layers=40).gradients == _cost("kl", bits=12).gradients == 2 * _cost("kl").gradients
    alone, both = _cost("channel_groups").gradients, _cost("channel_groups", "loss_change").gradients
    assert both - alone == pytest.approx(17 * _cost("loss_change").gradients)  # each of up to 16 groups is tried too


def test_seconds_follow_the_clock_and_the_rows(monkeypatch):
    monkeypatch.setattr(cost, "_gradient_seconds", lambda *args: 2.0)
    monkeypatch.setattr(cost, "multiplication_seconds", lambda: 1e-9)
    net = nn.Linear(100, 10)
    x = torch.randn(30, 100)
    layers = find_layers(net, x)
    target = make_objective("distill", net, [x])
    rows = estimate_seconds(net, layers, target, Cost(row_passes=1, row_products=True), tolerance=0.0)
    pairs = 300**2 * 111  # ten rows a sample, each a vector of 10 times one of 100
    assert rows == pytest.approx(2.0 * 2.3 * 10 + 1e-9 * (1.5 * pairs + 25 * 300**3))
    assert estimate_seconds(net, layers, target, Cost(0.2)) == pytest.approx(2.0 * 0.2)


def test_clocks_give_plausible_times():
    net = nets.small_cnn().eval()
    x, _ = nets.images(64, 0)
    layers = find_layers(net, x)
    with differentiable(net, layers):
        seconds = estimate_seconds(net, layers, make_objective("distill", net, [x]), Cost(1.0))
    assert 0 < seconds < 10
    assert 1e-13 < cost.multiplication_seconds() < 1e-6
