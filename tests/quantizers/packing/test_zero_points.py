"""Packed zero points against Python's whole numbers, bit by bit."""

import pytest
import torch
from every import every

from lightning_caq.quantizers.packing.zero_points import pack_zero_points, unpack_zero_points
from lightning_caq.sizes import zero_point_bits


@every("bits", range(1, 9))
def test_round_trip_in_as_many_bytes_as_are_counted(bits):
    for shape in ((1, 1, 1), (7, 1, 3), (4, 16)):
        zero_point = torch.randint(0, 2 * (2**bits - 1) + 1, shape) / 2
        packed = pack_zero_points(zero_point, bits)
        assert packed.dtype == torch.uint8
        assert (
            8 * len(packed) == zero_point_bits(zero_point.numel(), bits) == -(-zero_point.numel() * (bits + 1) // 8) * 8
        )
        assert torch.equal(unpack_zero_points(packed, bits, shape), zero_point)


def test_the_largest_of_every_width():
    for bits in range(1, 9):
        largest = torch.full((9,), 2.0**bits - 1)
        assert torch.equal(unpack_zero_points(pack_zero_points(largest, bits), bits, (9,)), largest)


@every("zero_point", [-0.5, 3.5, 0.25])
def test_zero_points_that_are_none_of_a_group(zero_point):
    with pytest.raises(ValueError, match="multiples of one half from 0 to 3"):
        pack_zero_points(torch.tensor([zero_point]), 2)


def test_bytes_of_other_zero_points():
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack_zero_points(torch.zeros(3, dtype=torch.uint8), 3, (4,))
