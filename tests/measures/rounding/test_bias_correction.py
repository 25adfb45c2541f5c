"""Bias corrections against means of errors that torch computes over every sample and position."""

import nets
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.measures.rounding.bias_correction import bias_corrections, correctable
from lightning_caq.network.layers import find_layers


@every(
    ("net", "shape", "axis"),
    [
        (nn.Linear(4, 3), (4,), -1),
        (nn.Linear(4, 3), (5, 4), -1),
        (nn.Conv1d(2, 3, 2, padding=1), (2, 6), 1),
        (nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1, padding_mode="reflect"), (4, 7, 6), 1),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (4, 3, 5), 1),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 1),
    ],
)
def test_the_mean_of_the_error_is_taken_out(net, shape, axis):
    net = net.double().eval()
    batches = [torch.randn(n, *shape, dtype=torch.float64) for n in (3, 2)]
    layers = find_layers(net, batches[0])
    delta = torch.randn_like(net.weight)
    found = bias_corrections(net, layers, batches, {"": {2: delta, 3: 2 * delta}})[""]
    x = torch.cat(batches)
    before = net(x)
    with torch.no_grad():
        net.weight.add_(delta)
        net.bias.add_(found[2])
    moved = (net(x) - before).movedim(axis, 0).flatten(1)
    assert torch.allclose(moved.mean(1), torch.zeros(len(moved), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found[3], 2 * found[2])


def test_a_convolution_takes_a_sample_without_an_axis_for_it():
    net, x = nn.Conv2d(2, 3, 2).double().eval(), torch.randn(2, 4, 5, dtype=torch.float64)
    delta = torch.randn_like(net.weight)
    [layer] = find_layers(net, x)
    found = bias_corrections(net, [layer], [x], {"": {2: delta}})[""][2]
    assert torch.allclose(found, -F.conv2d(x, delta).mean((1, 2)))


def test_a_weight_that_is_used_twice_is_corrected_for_both_uses():
    fc = nn.Linear(3, 3).double()
    net = nn.Sequential(fc, nn.ReLU(), fc).eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    [layer] = find_layers(net, x)
    delta = torch.randn(3, 3, dtype=torch.float64)
    found = bias_corrections(net, [layer], [x], {"0": {2: delta}})["0"][2]
    assert torch.allclose(found, -(torch.cat([x, fc(x).relu()]) @ delta.T).mean(0))


def test_what_can_be_corrected():
    net = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).eval()
    x = torch.randint(0, 9, (5,))
    layers = find_layers(net, x)
    assert [layer.name for layer in layers if correctable(net, layer)] == ["2", "4"]
    deltas = {layer.name: {2: torch.ones(layer.shape)} for layer in layers}
    assert list(bias_corrections(net, layers, [x], deltas)) == ["2", "4"]


def test_a_layer_that_no_batch_reaches_is_left_out():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    net, x = Idle().eval(), torch.randn(4, 3)
    layers = find_layers(net, x)
    assert list(bias_corrections(net, layers, [x], {n: {2: torch.ones(2, 3)} for n in ("used", "idle")})) == ["used"]


def test_the_network_is_left_as_it_was():
    case = nets.make_case("cnn")
    layers = find_layers(case.net, case.batches[0])
    before = {name: x.clone() for name, x in case.net.state_dict().items()}
    bias_corrections(case.net, layers, case.batches, {x.name: {2: torch.ones(x.shape).double()} for x in layers})
    assert all(torch.equal(x, before[name]) for name, x in case.net.state_dict().items())
