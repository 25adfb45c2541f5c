"""Integers against the grid's own values, to the last bit."""

import math

import numpy as np
import pytest
import torch
from every import every

from lightning_caq.errors import ExportError
from lightning_caq.export.integers import TYPES, to_integers
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid

SMALLEST = {  # by bit-width: with whole zero points among the codes, and with half-integer ones
    1: ("uint4", "uint4"), 2: ("uint4", "uint4"), 3: ("uint4", "uint4"), 4: ("uint4", "uint8"),
    5: ("uint8", "uint8"), 7: ("uint8", "uint8"), 8: ("uint8", "uint16"),
}  # fmt: skip


def _weight(grid, shape, seed=0):
    codes = np.random.default_rng(seed).integers(0, 2**grid.bits, shape)
    return grid.values(torch.from_numpy(codes))


@every("bits", range(1, 9))
@every("half", [0.0, 0.5])
@every("away", [0, 3, -3, 5000, -16000])
@every("axis", [0, 1, None])
def test_the_products_are_those_of_the_grid(bits, half, away, axis):
    shape = (6, 5, 3)
    scales = tuple(n if d == axis else 1 for d, n in enumerate(shape))
    zero = torch.full(scales, float(2 ** (bits - 1) + away))
    zero[0] += half
    grid = Grid(bits, torch.rand(scales, generator=torch.Generator().manual_seed(bits)) + 1e-3, zero)
    weight = _weight(grid, shape)
    x = to_integers(weight, grid)
    # What ONNX's DequantizeLinear does, written down with numpy.
    kind = np.dtype("uint8" if x.type == "uint4" else x.type)
    view = [1, 1, 1] if axis is None else [n if d == x.axis else 1 for d, n in enumerate(shape)]
    stored, zeros = x.values.numpy().astype(kind), x.zero_point.numpy().astype(kind).reshape(view)
    found = (stored.astype(np.int32) - zeros.astype(np.int32)).astype(np.float32) * x.scale.numpy().reshape(view)
    assert np.array_equal(found, weight.numpy())
    assert 0 <= int(x.values.min()) <= int(x.values.max()) <= TYPES[x.type]
    assert 0 <= int(x.zero_point.min()) <= int(x.zero_point.max()) <= TYPES[x.type]


@every("bits", SMALLEST)
def test_the_smallest_type(bits):
    for half, kind in zip((0.0, 0.5), SMALLEST[bits], strict=True):
        grid = Grid(bits, torch.ones(4, 1), torch.full((4, 1), 2 ** (bits - 1) - half))
        assert to_integers(_weight(grid, (4, 6)), grid).type == kind


def test_scales_along_two_dimensions():
    with pytest.raises(ExportError, match=r"Scales of shape \[2, 3\]"):
        to_integers(torch.zeros(2, 3), Grid(2, torch.ones(2, 3), torch.ones(2, 3)))


def test_multiples_of_a_step_are_the_smallest_type_that_spans_them():
    step = torch.tensor([[0.25]])
    for codes, kind in (([-3, 0, 12], "uint4"), ([5, 9, 100], "uint8"), ([-200, 7, 90], "uint16")):
        weight = step * torch.tensor([codes]).float()
        stored = to_integers(weight, SteppedGrid(step))
        assert stored.type == kind
        assert stored.values.min() >= 0
        assert torch.equal(stored.scale * (stored.values - stored.zero_point), weight)
    with pytest.raises(ExportError, match="coding='fixed'"):
        to_integers(step * torch.tensor([[0.0, 70_000.0]]), SteppedGrid(step))


def _grouped(shape, axis, bits, half, size=16):
    """A grid with a scale a group, and a weight on it."""
    channels = tuple(n if d == axis else 1 for d, n in enumerate(shape))
    groups = math.ceil(math.prod(shape) / shape[axis] / size)
    draws = torch.Generator().manual_seed(bits)
    scale = torch.rand((*channels, groups), generator=draws) + 0.1
    zero = torch.randint(0, 2**bits - 1, (*channels, groups), generator=draws) + half
    grid = Grid(bits, scale, zero.float(), group_size=size)
    return grid, _weight(grid, shape)


@every("bits", [2, 4, 8])
@every("half", [0.0, 0.5])
@every(("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((6, 4, 3, 3), 0)])
def test_blocks_are_those_of_onnx(shape, axis, half, bits):
    grid, weight = _grouped(shape, axis, bits, half)
    x = to_integers(weight, grid)
    assert x.group_size == 16
    assert x.type == SMALLEST[bits][half > 0]
    # DequantizeLinear with block_size, written down with numpy.
    length = x.values.shape[x.axis]
    scale, zero = (np.repeat(y.numpy(), 16, x.axis).take(range(length), x.axis) for y in (x.scale, x.zero_point))
    found = (x.values.numpy() - zero).astype(np.float32) * scale
    assert np.array_equal(found.reshape(shape), weight.numpy())
    assert x.shape == (() if len(shape) == 2 else shape)
    assert 0 <= int(x.values.min()) <= int(x.values.max()) <= TYPES[x.type]


def test_one_group_a_channel_is_no_block():
    grid, weight = _grouped((6, 16), 0, 4, 0.0)
    x = to_integers(weight, grid)
    assert (x.group_size, x.axis, tuple(x.scale.shape)) == (None, 0, (6,))
    assert torch.equal((x.values - x.zero_point[:, None]).float() * x.scale[:, None], weight)


def test_blocks_need_a_late_opset():
    grid, weight = _grouped((6, 40), 0, 4, 0.0)
    with pytest.raises(ExportError, match="block_size of DequantizeLinear, which ONNX has from opset 21 on"):
        to_integers(weight, grid, ("uint8",))
