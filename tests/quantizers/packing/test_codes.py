"""Codes of affine grids, of channels that differ, and of codebooks, there and back."""

import pytest
import torch
from every import every

from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.packing.codes import pack_codes, unpack_codes


@every("bits", range(1, 9))
@every("shape", [(3, 5), (2, 3, 3, 3), (1, 1)])
def test_there_and_back_and_the_bytes_that_it_takes(bits, shape):
    ones = torch.ones(shape[0], *[1] * (len(shape) - 1))
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    for values in (Grid(bits, ones, 0 * ones), Codebook.of("codebook", bits, torch.randn(*ones.shape, 2**bits))):
        packed = pack_codes(codes, values)
        assert packed.nbytes == -(-codes.numel() * bits // 8)
        assert torch.equal(unpack_codes(packed, values, shape), codes)


def test_channels_of_different_widths():
    bits = torch.tensor([[2], [8], [3]], dtype=torch.uint8)
    grid = Grid(8, torch.ones(3, 1), torch.zeros(3, 1), bits)
    codes = torch.stack([torch.randint(2 ** int(b), (5,), dtype=torch.uint8) for b in bits])
    packed = pack_codes(codes, grid)
    assert packed.nbytes == 2 + 5 + 2
    assert torch.equal(unpack_codes(packed, grid, (3, 5)), codes)
    with pytest.raises(ValueError, match="bytes"):
        unpack_codes(packed[:-1], grid, (3, 5))
