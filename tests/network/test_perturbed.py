"""A perturbed network against one whose parameters were written by hand, and the network it was made from."""

import copy

import pytest
import torch
from torch import nn

from lightning_caq.network.layers import find_layers
from lightning_caq.network.perturbed import perturbed, replaced_weights


def _net():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double().eval()


def test_weights_and_biases_are_those_with_errors_and_shifts_added():
    net, x = _net(), torch.randn(5, 2, 3, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    errors = {layer.name: torch.randn(layer.shape, dtype=torch.float64) for layer in layers}
    shifts = {"0": torch.randn(3, dtype=torch.float64)}
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight.add_(errors["0"])
        other[0].bias.add_(shifts["0"])
        other[3].weight.add_(errors["3"])
        before, before_weight = net(x), net[0].weight.clone()
        with perturbed(net, layers, errors, shifts):
            assert torch.allclose(net(x), other(x))
        assert torch.equal(net(x), before)
        with perturbed(net, layers[:1], errors, {}):
            assert torch.equal(net[0].weight, before_weight + errors["0"])


def test_a_network_is_put_back_where_something_fails():
    net, x = _net(), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    errors, shifts = {"0": torch.ones(3, 2, 2, 2, dtype=torch.float64)}, {"0": torch.ones(3)}
    with pytest.raises(KeyError, match="3"), perturbed(net, layers, errors, shifts):
        pass
    with pytest.raises(ZeroDivisionError), perturbed(net, layers[:1], errors, shifts):
        raise ZeroDivisionError
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


def test_replaced_weights_are_the_given_values_and_parameters_stay_the_same_objects():
    net, x = _net(), torch.randn(1, 2, 3, 3, dtype=torch.float64)
    layers, weight = find_layers(net, x), net[0].weight
    before, values = weight.clone(), {layer.name: torch.rand(layer.shape) for layer in layers}
    with replaced_weights(net, layers, values):
        assert net[0].weight is weight
        assert torch.equal(net[0].weight, values["0"].double())
        assert torch.equal(net[3].weight, values["3"].double())
    assert torch.equal(weight, before)
