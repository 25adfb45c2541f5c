"""Coded weights: all kinds of layers come back, and the bits of layers add up to the bytes of the stream."""

from __future__ import annotations

import pytest
import torch

from lightning_caq.quantizers.packing.coded import MULTIPLES, decode_weights, encode_weights, layer_bits
from lightning_caq.quantizers.packing.entropy import CodingError
from lightning_caq.quantizers.rounding.trellis import round_trellis

SHAPES = [(8, 5), (6, 4, 3, 3), (6, 4, 3, 3), (12, 1, 3), (1, 1), (40, 16)]
TRANSPOSED = [0, 0, 2, 0, 0, 0]


def weights() -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=draws)).round().to(torch.int32) for shape in SHAPES]


def test_weights_of_every_kind_come_back() -> None:
    codes = weights()
    stream = encode_weights(codes, TRANSPOSED)
    for before, after in zip(codes, decode_weights(stream, SHAPES, TRANSPOSED), strict=True):
        assert after.dtype == torch.int32
        assert torch.equal(before, after)


def test_codes_on_the_trellis_take_fewer_bytes_than_as_plain_numbers() -> None:
    w = torch.randn(1, 64, 90, generator=torch.Generator().manual_seed(1))
    values = round_trellis(w, torch.eye(90)[None], 0.3)[0].to(torch.int32)
    off = values.clone()
    off[:, 0] ^= 1  # the parity of one column leaves the trellis
    assert len(encode_weights([values], [0])) < 0.85 * len(encode_weights([off], [0]))
    assert torch.equal(decode_weights(encode_weights([off], [0]), [(64, 90)], [0])[0], off)


def test_bits_of_the_layers_add_up_to_the_stream() -> None:
    codes = weights()
    bits = layer_bits(codes, TRANSPOSED)
    total = sum(b * x.numel() for b, x in zip(bits, codes, strict=True)) / 8
    assert round(total, 6) == len(encode_weights(codes, TRANSPOSED))
    assert bits[0] > 1


def test_damage_and_codes_that_are_too_large_are_refused() -> None:
    stream = encode_weights(weights(), TRANSPOSED)
    for cut in (0, 1, 5, len(stream) - 4):
        with pytest.raises(CodingError):
            decode_weights(stream[:cut], SHAPES, TRANSPOSED)
    with pytest.raises(CodingError, match=str(MULTIPLES - 1)):
        encode_weights([torch.tensor([[MULTIPLES]])], [0])
