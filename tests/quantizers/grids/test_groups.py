"""Groups against numpy, which cuts the rows of a weight by itself and quantizes each piece alone."""

import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.grids.groups import check_scale_type, group_counts, layer_group_size, spread
from lightning_caq.quantizers.grids.ranges import SYMMETRIES
from lightning_caq.quantizers.grids.zeros import with_zero

SHAPES = {"linear": ((6, 70), 0), "even": ((6, 64), 0), "conv": ((4, 5, 3, 3), 0), "inputs first": ((70, 6), 1)}


def _pieces(weight, axis, size):
    """Rows of a weight, cut; numpy."""
    rows = np.moveaxis(weight.numpy(), axis, 0).reshape(weight.shape[axis], -1)
    return [rows[:, start : start + size] for start in range(0, rows.shape[1], size)]


def _channel_shape(shape, axis):
    return tuple(n if d == axis else 1 for d, n in enumerate(shape))


@every("size", [16, 32])
@every("name", SHAPES)
def test_each_weight_has_the_scale_and_zero_point_of_its_piece(name, size):
    shape, axis = SHAPES[name]
    weight = torch.randn(shape)
    grid = fit_grid(weight, 3, _channel_shape(shape, axis), group_size=size)
    scales, zeros = (x.flatten(0, -2).numpy() for x in (grid.scale, grid.zero_point))
    found = _pieces(grid.nearest(weight), axis, size)
    assert scales.shape == (shape[axis], len(found))
    for g, (piece, rounded) in enumerate(zip(_pieces(weight, axis, size), found, strict=True)):
        s, z = scales[:, g, None], zeros[:, g, None]
        assert np.array_equal(rounded, s * (np.clip(np.rint(piece / s + z), 0, 7) - z))


@every("symmetry", SYMMETRIES)
@every("ends", ["mse", "minmax", "percentile", "aciq"])
def test_a_group_is_fitted_as_if_it_were_a_channel(ends, symmetry):
    weight = torch.randn(5, 100)
    rule = {"range": ends, "symmetry": symmetry}
    grid = fit_grid(weight, 2, (5, 1), group_size=32, **rule)
    for g, piece in enumerate(weight.split(32, 1)):
        alone = fit_grid(piece, 2, (5, 1), **rule)
        assert torch.equal(grid.scale[..., g], alone.scale)
        assert torch.equal(grid.zero_point[..., g], alone.zero_point)


@every("bits", [2, 8])
def test_zero_points_of_groups_lie_within_the_codes(bits):
    weight = torch.rand(4, 64) + torch.tensor([3.0, -4.0, 0.0, -0.5])[:, None]
    grid = fit_grid(weight, bits, (4, 1), group_size=32)
    assert bool(((grid.zero_point >= 0) & (grid.zero_point <= 2**bits - 1)).all())
    assert torch.equal(2 * grid.zero_point, (2 * grid.zero_point).round())
    error = (grid.nearest(weight) - weight).abs().amax(1)
    reach = torch.maximum(weight.abs().amax(1), weight.amax(1) - weight.amin(1))
    assert bool((error <= 0.6 * reach / (2**bits - 1)).all())  # half a step of a grid that reaches zero


@every("dtype", [torch.float16, torch.bfloat16])
@every("rule", ["mse", "minmax"])
def test_scales_are_numbers_of_their_type_and_codes_are_the_nearest_to_them(rule, dtype):
    weight = torch.randn(5, 100)
    grid = fit_grid(weight, 3, (5, 1), group_size=64, scale_dtype=dtype, range=rule)
    assert grid.scale.dtype == dtype
    values = torch.stack([grid.values(torch.full((5, 100), code)) for code in range(8)])
    distance = (values - weight).abs().amin(0)
    assert torch.allclose((grid.nearest(weight) - weight).abs(), distance, atol=1e-6)


def test_the_error_with_short_scales_is_hardly_larger():
    weight = torch.randn(40, 256)
    errors = {
        dtype: float((fit_grid(weight, 3, (40, 1), group_size=64, scale_dtype=dtype).nearest(weight) - weight).norm())
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    assert errors[torch.float16] < 1.002 * errors[torch.float32]
    assert errors[torch.bfloat16] < 1.005 * errors[torch.float32]


def test_kept_zeros_of_groups():
    weight = torch.randn(6, 100)
    zeros = torch.rand(6, 100) < 0.5
    weight = weight.masked_fill(zeros, 0.0)
    grid = with_zero(fit_grid(weight, 2, (6, 1), group_size=32, scale_dtype=torch.float16), weight, zeros)
    assert grid.scale.dtype == torch.float16
    assert grid.scale.shape == (6, 1, 4)
    assert not grid.nearest(weight)[zeros].any()
    assert bool(((grid.zero_point >= 0) & (grid.zero_point <= 3)).all())


def test_one_number_a_weight_by_hand():
    numbers = torch.arange(6.0).reshape(1, 2, 3)  # two channels along the second dimension, three groups each
    expected = torch.tensor([[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]).float().T
    assert torch.equal(spread(numbers, 2, (5, 2)), expected)


def test_layers_and_their_groups():
    layers = [
        Layer("fc", "linear", (10, 130)),
        Layer("conv", "conv2d", (8, 4, 3, 3)),
        Layer("up", "conv_transpose2d", (8, 4, 3, 3)),
        Layer("words", "embedding", (50, 64)),
    ]
    assert group_counts(layers, 64) == (3, 1, 0, 1)
    assert group_counts(layers, None) == ()
    assert [layer_group_size(layer, 32) for layer in layers] == [32, 32, None, 32]


def test_scales_that_a_type_cannot_hold():
    net = nn.Linear(4, 3)
    layer = Layer("", "linear", (3, 4))
    for factor, dtype in ((1e-6, "float16"), (1e7, "float16")):
        with torch.no_grad():
            net.weight.normal_().mul_(factor)
        with pytest.raises(OptionError, match=f"scale_dtype='{dtype}' cannot hold the scales of ''.*'bfloat16'"):
            check_scale_type(net, [layer], dtype, 8)
        for other in ("bfloat16", "float32"):
            check_scale_type(net, [layer], other, 8)
    with torch.no_grad():
        net.weight.zero_()
    check_scale_type(net, [layer], "float16", 8)
