"""Error feedback where inputs are dead or never change, and where channels are constant."""

import copy

import rounding_help
import torch
from every import every
from torch import nn

from lightning_caq.network.layers import find_layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), (12,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
}


def _round(module, x, rounding="error_feedback", bits=3):
    net = nn.Sequential(copy.deepcopy(module))
    (layer,) = find_layers(net, x)
    floats = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grid, codes = rounding_help.rounded(net, layer, bits, rounding, [x], floats)
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        rounded.weight.copy_(grid.values(codes))
    return rounded, grid, codes


def _error(module, rounded, x):
    with torch.no_grad():
        return float((module(x) - rounded(x)).square().mean())


@every("kind", LAYERS)
def test_channels_that_are_always_zero_say_nothing_about_the_others(kind):
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    module, x = make(), torch.randn(64, *shape) + 0.5
    x[:, ::2] = 0
    found, _, codes = _round(module, x)
    near = _round(module, x, "nearest")[0]
    assert found.weight.isfinite().all()
    assert int(codes.max()) < 8
    assert _error(module, found, x) < _error(module, near, x)
    # What meets the dead channels may not have moved far from its float value: nothing pulls it anywhere.
    dead = (found.weight - module.weight)[::2] if kind == "transposed" else (found.weight - module.weight)[:, ::2]
    span = (module.weight.max() - module.weight.min()) / 7
    assert dead.abs().max() < 1.5 * span


@every("kind", LAYERS)
def test_without_any_input_weights_go_to_the_nearest_values(kind):
    torch.manual_seed(2)
    make, shape = LAYERS[kind]
    module, x = make(), torch.zeros(8, *shape)
    found, grid, codes = _round(module, x)
    assert torch.equal(codes, grid.codes(module.weight).to(torch.uint8))
    assert (found.weight - module.weight).abs().max() < (module.weight.max() - module.weight.min()) / 4


@every("value", [0.0, 0.3, -1e-30, 70.0])
@every("kind", LAYERS)
def test_constant_channels_are_kept_by_error_feedback(kind, value):
    torch.manual_seed(3)
    make, shape = LAYERS[kind]
    module, x = make(), torch.randn(64, *shape)
    with torch.no_grad():
        (module.weight[:, :2] if kind == "transposed" else module.weight[:2]).fill_(value)
    found, grid, _ = _round(module, x)
    held = found.weight[:, :2] if kind == "transposed" else found.weight[:2]
    torch.testing.assert_close(held, torch.full_like(held, value), rtol=1e-5, atol=1e-12)
    assert grid.scale.isfinite().all()
    assert (grid.scale > 0).all()


def test_inputs_that_never_change_still_leave_outputs_right():
    torch.manual_seed(4)
    module, x = nn.Linear(12, 6), torch.randn(1, 12).expand(40, 12)
    found = _round(module, x, bits=2)[0]
    # One direction carries everything: twelve weights with four values each can meet it closely.
    assert _error(module, found, x) < 0.02 * _error(module, _round(module, x, "nearest", bits=2)[0], x) + 1e-6
