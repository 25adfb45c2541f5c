"""Learned scales against autograd with a straight-through estimator."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.rounding.scale_importance import learned_step, scale_importance
from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.network.objective import make_objective


def _straight_through(x):
    return x + (x.round() - x).detach()


@every("bits", [2, 3, 8])
def test_the_quantizer_and_its_derivative_are_those_of_lsq(bits):
    weight = torch.randn(500, dtype=torch.float64)
    scale = torch.tensor(2.5 / 2 ** (bits - 1), dtype=torch.float64, requires_grad=True)
    codes = torch.clamp(weight / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    expected = _straight_through(codes) * scale
    upstream = torch.randn(500, dtype=torch.float64)
    (slope,) = torch.autograd.grad(expected, scale, upstream)
    rounded, derivative = learned_step(weight, float(scale.detach()), bits)
    torch.testing.assert_close(rounded, expected.detach())
    assert float(upstream @ derivative) == pytest.approx(float(slope), rel=1e-9)
    assert len(rounded.unique()) <= 2**bits


def test_one_bit_has_a_value_on_either_side():
    rounded, _ = learned_step(torch.tensor([-3.0, 3.0]), 1.0, 1)
    assert rounded.tolist() == [-1, 1]


def _scales(case, bits=(2, 4), **options):
    case.net.requires_grad_(True)
    return scale_importance(case.net, find_layers(case.net, case.batches[0]), case.batches, bits, **options)


@every("name", nets.CASES)
def test_every_layer_has_scales_and_the_weights_are_put_back(name):
    case = nets.make_case(name)
    before = {key: value.clone() for key, value in case.net.state_dict().items()}
    found = _scales(case, steps=3)
    assert all(torch.equal(before[key], value) for key, value in case.net.state_dict().items())
    for layer in find_layers(case.net, case.batches[0]):
        start = 2 * float(layer_weight(case.net, layer).detach().abs().mean())
        for bits, largest in ((2, 1), (4, 7)):
            # Three steps of Adam move the logarithm by 0.05 each at most, to speak of.
            assert found[layer.name][bits] == pytest.approx(start / largest**0.5, rel=0.2)


def test_training_makes_the_quantized_network_better():
    x, y = nets.images(256, 0)
    net = nets.trained(nets.small_cnn(), x, y).eval()
    layers = find_layers(net, x)
    target = make_objective("distill", net, [x])
    floats = [layer_weight(net, layer).detach().clone() for layer in layers]

    def loss(scales):
        with torch.no_grad():
            for layer, values in zip(layers, floats, strict=True):
                layer_weight(net, layer).copy_(learned_step(values, scales[layer.name][3], 3)[0])
            found = target.value(net)
            for layer, values in zip(layers, floats, strict=True):
                layer_weight(net, layer).copy_(values)
        return found

    starts = {x.name: {3: 2 * float(w.abs().mean()) / 3**0.5} for x, w in zip(layers, floats, strict=True)}
    # 32 of the samples at a time: the mean over more than one part must fall, not the last one's.
    assert loss(scale_importance(net, layers, [x], [3])) < 0.7 * loss(starts)


def test_a_seed_repeats_it_and_only_the_random_bits_depend_on_it():
    case = nets.make_case("mlp")
    assert _scales(case, steps=5) == _scales(case, steps=5)
    assert _scales(case, steps=5) != _scales(case, steps=5, seed=1)


def test_layers_that_do_not_matter_keep_their_scales():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "zero": nn.Linear(2, 2)})
    nn.init.zeros_(net["zero"].weight)
    net.forward = lambda x: net["zero"](net["used"](x))
    x = torch.randn(8, 3)
    found = scale_importance(net, find_layers(net, x), [x], (2, 4), steps=5)
    start = 2 * float(net["idle"].weight.detach().abs().mean())
    assert found["idle"] == pytest.approx({2: start, 4: start / 7**0.5})
    assert found["zero"] == {2: 1.0, 4: 1.0}
