"""Fake-quant modules against plain modules that hold the rounded weights."""

import copy
import io
import pickle
import warnings

import nets
import pytest
import torch
import torch.nn.functional as F
from channel_layers import CHANNEL_LAYERS, WIDTHS, one_layer
from every import every
from torch import nn

from lightning_caq.network.layers import layer_weight, quantizable_layers
from lightning_caq.quantizers.fake_quant.learning import learning_scales
from lightning_caq.quantizers.fake_quant.modules import fake_quant_class, on_grid, quantized_weight
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules, swap
from lightning_caq.quantizers.grids.affine import fit_grid

MODULES = {
    **nets.CONVOLUTIONS,
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "no_bias": (lambda: nn.Linear(5, 3, bias=False), (2, 5)),
    "conv_no_bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
}


class Doubled(nn.Linear):
    """A forward of the user's own."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Renamed(nn.Conv2d):
    """A subclass that only adds."""

    note = "mine"


def _grids(net, bits=3):
    return {
        name: fit_grid(net.get_submodule(name).weight, bits, layer.channel_shape)
        for layer in quantizable_layers(net)
        for name in layer.modules
    }


def _swapped(net, bits=3):
    """The network, swapped, and a plain copy with rounded weights."""
    plain, grids = copy.deepcopy(net), _grids(net, bits)
    with torch.no_grad():
        for name, grid in grids.items():
            weight = plain.get_submodule(name).weight
            weight.copy_(grid.nearest(weight))
    swap(net, grids)
    return net, plain


@every("name", MODULES)
def test_forward_and_gradients_are_those_of_the_rounded_weights(name):
    make, shape = MODULES[name]
    net, plain = _swapped(nn.Sequential(make()))
    x = torch.randn(4, *shape, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    y, expected = net(x), plain(again)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)  # straight through the rounding
    if net[0].bias is not None:
        torch.testing.assert_close(net[0].bias.grad, plain[0].bias.grad)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)


def test_embeddings_keep_their_options():
    table = nn.Embedding(7, 3, padding_idx=0, scale_grad_by_freq=True)
    net, plain = _swapped(nn.Sequential(table))
    words = torch.tensor([[0, 1, 1, 5]])
    for each in (net, plain):
        each(words).square().sum().backward()
    torch.testing.assert_close(net(words), plain(words))
    torch.testing.assert_close(net[0].weight.grad, plain[0].weight.grad)
    assert not net(words)[0, 0].any()  # the padding is zero still
    assert not net[0].weight.grad[0].any()


def test_transposed_convolutions_take_an_output_size():
    net, plain = _swapped(nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2)))
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(net[0](x, output_size=[10, 9]), plain[0](x, output_size=[10, 9]))


def test_subclasses_of_the_user():
    net, plain = _swapped(nn.Sequential(Renamed(2, 3, 3), nn.Flatten(), Doubled(27, 2)))
    assert type(net[0]).__name__ == "FakeQuantRenamed"
    assert isinstance(net[0], Renamed)
    assert net[0].note == "mine"
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(net[0](x), plain[0](x))
    with torch.no_grad():
        net[2].weight.copy_(plain[2].weight)  # what a plan does; a forward of its own reads the weight
    torch.testing.assert_close(net(x), plain(x))


def test_a_class_is_made_once():
    assert fake_quant_class(nn.Linear) is fake_quant_class(nn.Linear)
    assert fake_quant_class(nn.Linear) is not fake_quant_class(Doubled)


def _copied(net):
    return copy.deepcopy(net)


def _pickled(net):
    return pickle.loads(pickle.dumps(net))


def _saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every("duplicate", [_copied, _pickled, _saved])
def test_copies_stay_quantized(duplicate):
    net, _ = _swapped(nets.small_cnn())
    net.eval()
    x = torch.randn(3, 1, 8, 8)
    other = duplicate(net)
    assert torch.equal(other(x), net(x))
    assert list(quantized_modules(other)) == list(quantized_modules(net)) == ["0", "4", "10"]
    assert type(other[0]) is type(net[0])
    assert other[0].weight is not net[0].weight
    with torch.no_grad():
        other[0].weight.add_(1)
    assert not torch.equal(other(x), net(x))
    restore_modules(other)
    assert type(other[0]) is nn.Conv2d


def test_trains_on():
    x, y = nets.images(256, 0)
    net, _ = _swapped(nets.trained(nets.small_cnn(), x, y, steps=40), bits=2)
    loss = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    before, held = float(loss().detach()), {n: p.detach().clone() for n, p in net.named_parameters()}
    nets.trained(net, x, y, steps=60)
    net.train()
    assert float(loss().detach()) < 0.8 * before
    assert all(not torch.equal(p, held[n]) for n, p in net.named_parameters())
    for module in quantized_modules(net).values():
        assert on_grid(quantized_weight(module), rounding_state(module).grid)
        assert not on_grid(module.weight, rounding_state(module).grid)  # the latent weight moves freely


NAMES = [
    "scale",
    "zero_point",
    "bits",
    "grid",
    "table",
    "basis",
    "quantizer",
    "plan",
    "codes",
    "channel_bits",
    "input_grid",
    "quantizing",
    "plain_class",
    "layout",
    "scale_factor",
    "clip_factor",
    "state",
    "quantized_weight",
    "rounded_input",
    "learned_input_grid",
    "calibrated",
]


def _named(values):
    class Named(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            for name, value in values.items():
                setattr(self, name, value)

        def forward(self, x):
            return F.linear(x, self.weight * 0.5, self.bias)

    return Named()


def test_attributes_of_a_subclass_stay_what_they_are():
    for make in (lambda: 0.3, lambda: torch.ones(2), lambda: nn.Parameter(torch.ones(2)), lambda: nn.ReLU()):
        values = {name: make() for name in NAMES}
        net = nn.Sequential(_named(values))
        keys, x = list(net.state_dict()), torch.randn(4, 5)
        swap(net, _grids(net, 3))
        other = copy.deepcopy(net)
        with learning_scales(net):
            net(x).sum().backward()
            assert list(net.state_dict()) == keys
        assert all(getattr(net[0], name) is value for name, value in values.items())
        assert torch.equal(net(x), other(x))
        restore_modules(net)
        assert all(getattr(net[0], name) is value for name, value in values.items())
        assert not any("caq" in name for name in dir(net[0]))


def test_a_forward_of_its_own_runs_on_the_rounded_weight_and_trains_the_latent_one():
    net = nn.Sequential(_named({}))
    grids, x = _grids(net, 2), torch.randn(4, 5)
    swap(net, grids)
    net(x).sum().backward()
    rounded = grids["0"].nearest(net[0].weight.detach())
    assert not torch.equal(rounded, net[0].weight)
    assert torch.equal(net(x), F.linear(x, rounded * 0.5, net[0].bias))
    assert torch.allclose(net[0].weight.grad, 0.5 * x.sum(0).expand(3, 5))


def test_moves_with_its_network():
    net, plain = _swapped(nn.Sequential(nn.Linear(4, 3)))
    net.double()
    assert net(torch.randn(2, 4).double()).dtype == torch.float64
    assert torch.equal(quantized_weight(net[0]).float(), plain[0].weight)


@every("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    net = nn.Sequential(nn.Linear(16, 3)).to(dtype)
    swap(net, _grids(net, 8))
    assert net(torch.randn(2, 16).to(dtype)).dtype == dtype
    with torch.no_grad():
        net[0].weight.copy_(quantized_weight(net[0]))
    assert on_grid(net[0].weight, rounding_state(net[0]).grid)


def test_loading_quantized_weights_keeps_quantizing():
    net, plain = _swapped(nn.Sequential(nn.Linear(4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(plain.state_dict())
    assert rounding_state(net[0]).quantizing


def test_loading_float_weights_runs_as_the_float_network_and_says_so():
    source = nn.Sequential(nn.Linear(4, 3))
    net, plain = _swapped(copy.deepcopy(source))
    with pytest.warns(UserWarning, match="weights that do not lie on its grids.*run as the float layers they are"):
        net.load_state_dict(source.state_dict())
    assert not rounding_state(net[0]).quantizing
    x = torch.randn(2, 4)
    assert torch.equal(net(x), source(x))
    net.load_state_dict(plain.state_dict())
    assert rounding_state(net[0]).quantizing
    assert torch.equal(net(x), plain(x))


def test_loading_without_the_weight_changes_nothing():
    net, _ = _swapped(nn.Sequential(nn.Linear(4, 3)))
    net.load_state_dict({"0.bias": torch.zeros(3)}, strict=False)
    assert rounding_state(net[0]).quantizing


@every("dtype", [torch.float32, torch.bfloat16])
def test_on_grid(dtype):
    w = torch.randn(4, 50)
    grid = fit_grid(w, 4, (4, 1))
    rounded = grid.nearest(w).to(dtype)
    assert on_grid(rounded, grid)
    rounded[2, 3] += 0.3 * grid.scale[2, 0]
    assert not on_grid(rounded, grid)


def test_export():
    net, plain = _swapped(nets.small_cnn())
    net.eval(), plain.eval()
    x = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), plain(x))


@every("name", CHANNEL_LAYERS)
def test_modules_snap_every_channel_to_its_own_values(name):
    net, layer, x = one_layer(name)
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
