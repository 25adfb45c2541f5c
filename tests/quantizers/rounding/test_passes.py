"""Paired passes whose inputs are rounded on the way: what each of the two networks sees."""

import copy

import pytest
import torch
from every import every
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.quantizers.grids.activations import fit_input_grid
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.quantizers.rounding.round_layer import round_layer


def _network():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(20, 6), torch.randn(7, 6)]
    return net, batches, find_layers(net, batches[0])


@torch.no_grad()
def test_one_network_runs_on_rounded_inputs_and_the_other_on_its_own():
    net, batches, layers = _network()
    floats = {name: x.detach().clone() for name, x in net.state_dict().items()}
    x, x_float = torch.cat(batches), torch.cat(batches)
    with PairedPasses(net, layers, batches, floats) as passes:
        for layer, bits in zip(layers, [8, 2, 3], strict=True):
            passes.round_inputs(layer, bits)
            grid = fit_input_grid(x, bits)  # the samples are few, so all of them are used
            assert passes.inputs[layer.name] == grid
            sides = zip(*passes.calls(layer), strict=True)
            now, before = (torch.cat([call.inputs for calls in side for call in calls]) for side in sides)
            assert torch.equal(now, grid.nearest(x))
            torch.testing.assert_close(before, x_float)
            x_float = torch.relu(net[int(layer.name)].forward(x_float))
            layer_weight(net, layer).mul_(1.25)  # what comes next sees this in one of the networks alone
            x = torch.relu(net[int(layer.name)].forward(now))
    assert not any(module._forward_pre_hooks for module in net.modules())


@every("rounding", ["nearest", "error_feedback"])
@torch.no_grad()
def test_weights_make_up_for_the_rounding_of_their_inputs(rounding):
    """Against the least-squares weight for the rounded inputs, computed by numpy's solver in float64."""
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(6, 4, bias=False)).eval(), torch.randn(4000, 6) @ torch.randn(6, 6)
    (layer,), floats = find_layers(net, x), {"0.weight": net[0].weight.detach().clone()}
    outputs = []
    for bits in (None, 2):
        with PairedPasses(net, [layer], [x], floats) as passes:
            if bits is not None:
                passes.round_inputs(layer, bits)
            grid, codes = round_layer(net, layer, 8, rounding, passes)
            outputs.append((passes.inputs.get("0"), grid.values(codes)))
    (_, plain), (grid, fitted) = outputs
    z = grid.nearest(x).double()
    best = torch.linalg.lstsq(z, x.double() @ floats["0.weight"].double().T).solution.T
    if rounding == "nearest":
        assert torch.equal(plain, fitted)
        return
    # Eight bits and a tenth of damping away from the optimum, which is far from the float weight.
    assert float((fitted - best).norm()) < 0.5 * float((plain - best).norm())


def test_an_error_between_two_layers_leaves_no_hooks():
    net, batches, layers = _network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(OptionError, match="bits go from 1 to 8"), PairedPasses(net, layers, batches, {}) as passes:
        passes.round_inputs(layers[0], 9)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
