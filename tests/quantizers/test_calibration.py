"""Calibration of inputs: what is seen, in which order, and that the network stays as it was."""

import copy

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.allocation.mixed import input_bits
from lightning_caq.network.layers import find_layers
from lightning_caq.quantizers import calibration
from lightning_caq.quantizers.calibration import calibrate_inputs, rounded_inputs, sample_inputs
from lightning_caq.quantizers.grids.activations import InputGrid, fit_input_grid


def _mlp():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(20, 4), torch.randn(7, 4)]
    return net, batches, find_layers(net, batches[0])


def test_grids_are_those_of_each_layers_inputs_with_the_inputs_before_rounded():
    net, batches, layers = _mlp()
    grids = calibrate_inputs(net, layers, batches, [8, 2, 3])
    x = torch.cat(batches)
    for name, bits in (("0", 8), ("2", 2), ("4", 3)):
        assert grids[name] == fit_input_grid(x, bits)  # the samples are few, so all of them are used
        with torch.no_grad():
            x = net[int(name)](grids[name].nearest(x)).relu()
    assert grids["0"].zero_point > 0
    assert grids["2"].zero_point == grids["4"].zero_point == 0


def test_the_network_is_left_as_it_was():
    net, batches, layers = _mlp()
    before, state, random = net(batches[0]), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    calibrate_inputs(net, layers, batches, [8, 4, 4])
    assert torch.equal(net(batches[0]), before)
    assert all(torch.equal(x, state[k]) for k, x in net.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_inputs_are_rounded_while_the_context_is_open():
    net, batches, layers = _mlp()
    grids = {"2": InputGrid(2, 0.5, 0)}
    with rounded_inputs(net, layers, grids), torch.no_grad():
        y = net(batches[0])
    with torch.no_grad():
        expected = net[4](net[2](grids["2"].nearest(net[0](batches[0]).relu())).relu())
    assert torch.equal(y, expected)
    with pytest.raises(ZeroDivisionError), rounded_inputs(net, layers, grids):
        1 / 0  # noqa: B018
    assert not any(m._forward_pre_hooks for m in net.modules())


@every("name", nets.CASES)
def test_networks_of_every_kind(name):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    grids = calibrate_inputs(case.net, layers, case.batches, input_bits(len(layers), 4))
    tokens = name == "tied"  # the first layer is an embedding and, tied to it, the last linear layer
    assert set(grids) == {layer.name for layer in layers}
    assert [grids[layer.name].bits for layer in layers] == [8] + [4] * (len(layers) - 1)
    with rounded_inputs(case.net, layers, grids), torch.no_grad():
        rounded = case.output(case.net, case.batches[0])
    plain = case.output(case.net, case.batches[0])
    assert not torch.equal(rounded, plain)
    assert float(((rounded - plain).norm() / plain.norm()).detach()) < (0.5 if tokens else 0.3)


def test_an_embedding_alone_has_no_grid():
    net, tokens = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)), torch.randint(0, 6, (5, 4))
    layers = find_layers(net, tokens)
    assert list(calibrate_inputs(net, layers, [tokens], input_bits(len(layers), 4))) == ["1"]


def test_samples_are_few_hold_the_extremes_and_count_batches_by_size(monkeypatch):
    monkeypatch.setattr(calibration, "_VALUES", 1000)
    net = nn.Linear(10, 1)
    batches = [torch.zeros(900, 10), torch.ones(100, 10)]
    batches[0][5, 5], batches[1][7, 7] = -7, 9
    values = sample_inputs(net, find_layers(net, batches[0]), batches)[""]
    assert len(values) <= 1010
    assert (values.min(), values.max()) == (-7, 9)
    assert 0.05 < float((values == 1).float().mean()) < 0.15
    again = sample_inputs(net, find_layers(net, batches[0]), batches)[""]
    assert torch.equal(values, again)
