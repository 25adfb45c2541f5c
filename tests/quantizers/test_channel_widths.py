"""Grids whose channels differ in their bits, against rounding each channel as if all had its bits."""

import rounding_help
import torch
from every import every
from torch import nn

from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.quantizers.fake_quant.modules import on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules, swap
from lightning_caq.quantizers.grids.affine import Grid, fit_grid

WIDTHS = (2, 5, 3, 8, 2, 4, 1, 3)
LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6,)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8), (8, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2), (3, 3, 3)),
    "transposed_groups": (lambda: nn.ConvTranspose2d(4, 16, 2, groups=2), (4, 3, 3)),
}


def _layer(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    net, x = nn.Sequential(make()), torch.randn(40, *shape)
    (layer,) = find_layers(net, x)
    return net, layer, x


def _channel(layer, tensor, c):
    return tensor.select(1 if layer.transposed else 0, c)


@every("name", LAYERS)
def test_each_channel_gets_the_grid_that_it_would_get_alone(name):
    net, layer, _ = _layer(name)
    weight = layer_weight(net, layer).detach()
    grid = fit_grid(weight, WIDTHS, layer.channel_shape)
    assert (grid.bits, grid.width) == (8, WIDTHS)
    rounded, codes = grid.nearest(weight), grid.codes(weight)
    for c, b in enumerate(WIDTHS):
        alone = fit_grid(weight, b, layer.channel_shape).nearest(weight)
        assert torch.equal(_channel(layer, rounded, c), _channel(layer, alone, c))
        assert int(_channel(layer, codes, c).max()) <= 2**b - 1
    assert on_grid(rounded, grid)
    assert not on_grid(weight, grid)


@every("rounding", ["nearest", "error_feedback"])
@every("name", LAYERS)
def test_each_channel_is_rounded_as_it_would_be_alone(name, rounding):
    """Neither feedback nor descent carries anything from one output channel to another."""
    net, layer, x = _layer(name)
    grid, codes = rounding_help.rounded(net, layer, WIDTHS, rounding, [x], {})
    assert grid.width == WIDTHS
    assert codes.dtype == torch.uint8
    for c, b in enumerate(WIDTHS):
        alone, own = rounding_help.rounded(net, layer, b, rounding, [x], {})
        assert torch.equal(_channel(layer, codes, c), _channel(layer, own, c))
        found, wanted = (_channel(layer, g.scale.expand(layer.shape), c) for g in (grid, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@every("name", LAYERS)
def test_modules_snap_every_channel_to_its_own_values(name):
    net, layer, x = _layer(name)
    weight = layer_weight(net, layer)
    grid = fit_grid(weight, WIDTHS, layer.channel_shape)
    with torch.no_grad():
        weight.copy_(grid.nearest(weight))
        wanted = net(x)
        swap(net, {layer.name: grid})
        assert torch.equal(net(x), wanted)
        assert rounding_state(next(iter(quantized_modules(net).values()))).grid.width == WIDTHS
        weight.add_(1e-3 * grid.scale)  # trained on, a little off its values
        torch.testing.assert_close(net(x), wanted)
    restore_modules(net)
    assert not hasattr(net.get_submodule(layer.name), "channel_bits")


def test_to_another_device_and_back():
    grid = Grid(4, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([[2], [4]], dtype=torch.uint8))
    moved = grid.to("meta").channel_bits
    assert moved is not None
    assert moved.device.type == "meta"
    assert grid.to("cpu").width == (2, 4)
