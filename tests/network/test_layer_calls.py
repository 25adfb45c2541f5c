"""Calls of layers, against hooks set by hand."""

import torch
from torch import nn

from lightning_caq.network.layer_calls import visit_layers
from lightning_caq.network.layers import find_layers


def test_every_call_of_a_shared_weight_is_shown_with_its_input():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    net[2].weight = net[0].weight
    batches = [torch.randn(4, 3), torch.randn(2, 3)]
    expected, seen = [], []
    layers = find_layers(net, batches[0])
    visit_layers(net, layers, batches, lambda layer, module, x: seen.append((layer.name, module, x)))
    for x in batches:
        with torch.no_grad():
            expected += [("0", net[0], x), ("0", net[2], net[:2](x))]
    assert [(name, module) for name, module, _ in seen] == [(name, module) for name, module, _ in expected]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(seen, expected, strict=True))
