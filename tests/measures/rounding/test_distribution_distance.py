"""Distances of distributions against scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from lightning_caq.measures.rounding.distribution_distance import distribution_distance
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.layers import Layer


def test_against_scipy():
    torch.manual_seed(1)
    weight = torch.randn(40, 50)
    net = torch.nn.Linear(50, 40)
    net.weight.data = weight
    deltas = nearest_errors(net, Layer("", "linear", (40, 50)), [2, 3, 5])
    found = distribution_distance(weight, deltas)
    for bits, delta in deltas.items():
        first, second = weight.double().numpy(), (weight.double() + delta.double()).numpy()
        edges = np.linspace(min(first.min(), second.min()), max(first.max(), second.max()), 65)
        p, q = (np.histogram(values, edges)[0] / values.size for values in (first, second))
        assert found[bits] == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-6)
    assert np.log(2) > found[2] > found[3] > found[5] > 0


def test_extremes():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0])
    apart = {1: torch.full((4,), 10.0), 2: torch.zeros(4)}
    assert distribution_distance(weight, apart) == pytest.approx({1: np.log(2), 2: 0.0})
    assert distribution_distance(torch.ones(3), {2: torch.zeros(3)}) == {2: 0.0}


def test_the_scale_of_a_layer_does_not_matter():
    weight = torch.randn(100)
    delta = 0.1 * torch.randn(100)
    small, large = (distribution_distance(c * weight, {2: c * delta})[2] for c in (0.25, 64.0))
    assert small == pytest.approx(large)
