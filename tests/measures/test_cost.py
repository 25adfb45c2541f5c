"""The estimate of the time: what it counts, and that it is of the right size."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures import cost
from lightning_caq.measures.cost import estimate_seconds, gradients_needed
from lightning_caq.measures.measure import MEASURES, differentiable
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective

COUNTS = {"layers": 20, "bits": 6, "eigenpairs": 64, "samples": 256, "first": 128}
FREE = {"rounding_error", "distribution_distance"}  # from the weights alone


def _needed(*needs, objective="distill", **changed):
    return gradients_needed(frozenset(needs), objective, **{**COUNTS, "rows": 766, **changed})


@every("objective", ["distill", "task"])
def test_every_measure_is_counted(objective):
    for need in MEASURES - FREE:
        assert _needed(need, objective=objective) > 0, need
    assert _needed(*FREE) == 0
    whole = _needed(*MEASURES, objective=objective)
    assert max(_needed(need, objective=objective) for need in MEASURES) < whole
    assert _needed("trace") == _needed("subspace")  # they come together


def test_what_grows_and_what_does_not():
    """In gradients over all samples: what looks at a part of them costs less of these where there are more."""
    assert _needed("kappa", samples=512) == _needed("kappa") / 2
    assert _needed("kappa", first=1000, samples=1000) == _needed("kappa", first=256, samples=1000)
    assert _needed("lipschitz", samples=512) == _needed("lipschitz") / 2
    assert _needed("subspace", rows=1532) == 2 * _needed("subspace")
    assert _needed("kl", layers=40) == _needed("kl", bits=12) == 2 * _needed("kl")


def test_seconds_follow_the_clock_and_the_rows(monkeypatch):
    monkeypatch.setattr(cost, "_gradient_seconds", lambda *args: 2.0)
    monkeypatch.setattr(cost, "_multiplication_seconds", lambda: 1e-9)
    net = nn.Linear(100, 10)
    x = torch.randn(30, 100)
    layers = find_layers(net, x)
    target = make_objective("distill", net, [x])
    found = estimate_seconds(net, layers, target, frozenset({"subspace"}), bits=6, eigenpairs=9, tolerance=0.0)
    pairs = 300**2 * 111  # ten rows a sample, each a vector of 10 times one of 100
    assert found == pytest.approx(2.0 * 1.5 * 10 + 1e-9 * (1.5 * pairs + 25 * 300**3))
    some = estimate_seconds(net, layers, target, frozenset({"inputs"}), bits=6, eigenpairs=9)
    assert some == pytest.approx(2.0 * 0.2)


def test_clocks_give_plausible_times():
    net = nets.small_cnn().eval()
    x, _ = nets.images(64, 0)
    layers = find_layers(net, x)
    with differentiable(net, layers):
        seconds = estimate_seconds(
            net, layers, make_objective("distill", net, [x]), frozenset({"inputs"}), bits=6, eigenpairs=4
        )
    assert 0 < seconds < 10
    assert 1e-13 < cost._multiplication_seconds() < 1e-6
