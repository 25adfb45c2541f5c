"""Packing against numpy's own bits, over shapes and widths."""

import numpy as np
import pytest
import torch
from every import every

from lightning_caq.quantizers.packing.bit_packing import pack, packed_bytes, unpack

COUNTS = (0, 1, 2, 7, 8, 9, 15, 16, 63, 64, 65, 1000, 4096, 12345)


def _codes(count, bits, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8))


@every("bits", range(1, 9))
@every("count", COUNTS)
def test_round_trips_in_the_fewest_bytes(count, bits):
    codes = _codes(count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) == int(np.ceil(count * bits / 8))
    assert torch.equal(unpack(packed, bits, count), codes)


@every("bits", range(1, 9))
def test_every_bit_of_the_codes_is_stored_once(bits):
    codes = _codes(1003, bits)
    packed = pack(codes, bits).numpy()
    assert np.unpackbits(packed).sum() == np.unpackbits(codes.numpy()).sum()
    for place in range(0, 1003, 101):  # one code changes one code's bits
        changed = codes.clone()
        changed[place] ^= 2**bits - 1
        assert np.unpackbits(packed ^ pack(changed, bits).numpy()).sum() == bits


@every("shape", [(), (3, 5), (16, 3, 3, 3), (2, 0, 4), (7, 1, 1)])
@every("dtype", [torch.uint8, torch.int64, torch.float32])
def test_any_shape_and_number_type(shape, dtype):
    count = int(np.prod(shape))
    codes = _codes(count, 3).reshape(shape)
    assert torch.equal(unpack(pack(codes.to(dtype), 3), 3, count).reshape(shape), codes)


def test_memory_layout_does_not_matter():
    codes = _codes(24 * 10, 5).reshape(24, 10)
    assert torch.equal(pack(codes.T.contiguous().T, 5), pack(codes, 5))
    assert torch.equal(pack(codes[:, ::2], 5), pack(codes[:, ::2].contiguous(), 5))


@every("bits", [0, 9, -1])
def test_widths_that_are_not_allowed(bits):
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(3), bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


@every("code", [-1, 8])
def test_codes_that_do_not_fit(code):
    with pytest.raises(ValueError, match=f"from 0 to 7; got {min(code, 0)} to {max(code, 0)}"):
        pack(torch.tensor([0, code]), 3)


@every("packed", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 2).byte()])
def test_bytes_of_another_number_of_codes(packed):
    with pytest.raises(ValueError, match="5 codes of 3 bits take 2 bytes"):
        unpack(packed, 3, 5)
