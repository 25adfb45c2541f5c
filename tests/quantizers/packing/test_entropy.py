"""Entropy coding: every code comes back, bytes are near the entropy, and damage is noticed."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_caq.quantizers.packing.contexts import NEXT_STATE, MatrixForm
from lightning_caq.quantizers.packing.entropy import LIMIT, CodingError, decode, encode


def laplace(seed: int, scale: float, *shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).laplace(0, scale, shape).round().astype(np.int64)


def entropy_bytes(codes: NDArray[np.int64]) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def round_trip(matrices: list[NDArray[np.int64]], forms: list[MatrixForm]) -> bytes:
    stream = encode(matrices, forms)
    for before, after in zip(matrices, decode(stream, forms), strict=True):
        np.testing.assert_array_equal(before, after)
    return stream


def test_all_shapes_periods_and_sizes_come_back() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        matrices, forms = [], []
        for _ in range(rng.integers(0, 5)):
            rows, columns = rng.integers(0, 40), rng.integers(0, 60)
            scale = 10.0 ** rng.uniform(-2, 7)
            matrices.append((rng.standard_t(2, (rows, columns)) * scale).clip(1 - LIMIT, LIMIT - 1).astype(np.int64))
            forms.append(MatrixForm(rows, columns, int(rng.choice([1, 3, 9])), bool(trial % 2)))
        round_trip(matrices, forms)


def test_the_largest_codes_come_back_among_zeros() -> None:
    codes = np.zeros((7, 300), dtype=np.int64)
    codes[3, [5, 6, 200]] = LIMIT - 1, 1 - LIMIT, 2**22
    round_trip([codes], [MatrixForm(7, 300)])


def test_bytes_are_within_one_percent_of_the_entropy_from_a_tenth_of_a_bit_to_eight() -> None:
    for scale in (0.15, 0.4, 1.2, 5.0, 40.0):
        codes = laplace(1, scale, 256, 1024)
        assert len(round_trip([codes], [MatrixForm(256, 1024)])) < 1.01 * entropy_bytes(codes) + 100, scale


def test_rows_and_columns_of_unlike_size_take_less_than_the_entropy_of_all_codes() -> None:
    rows, columns = np.exp(np.linspace(-2, 2, 128))[:, None], np.repeat(np.exp(np.linspace(-1, 1, 64)), 9)
    codes = (laplace(2, 1000, 128, 576) * rows * columns / 1500).round().astype(np.int64)
    together = len(round_trip([codes], [MatrixForm(128, 576, 9)]))
    assert together < 0.93 * entropy_bytes(codes)


def test_the_state_of_the_trellis_is_a_context() -> None:
    rng = np.random.default_rng(3)
    codes, state = np.zeros((200, 400), dtype=np.int64), np.zeros(200, dtype=np.int64)
    for j in range(400):  # odd states hold large codes, even ones small codes
        codes[:, j] = rng.laplace(0, np.where(state & 1, 3.0, 0.3)).round()
        state = NEXT_STATE[state, codes[:, j] & 1]
    known, unknown = (len(round_trip([codes], [MatrixForm(200, 400, 1, trellis)])) for trellis in (True, False))
    assert known < 0.85 * unknown


def test_small_matrices_share_what_is_learned() -> None:
    matrices = [laplace(seed, 0.8, 16, 27) for seed in range(40)]
    form = MatrixForm(16, 27)
    assert len(encode(matrices, [form] * 40)) < 0.97 * sum(len(encode([x], [form])) - 13 for x in matrices)


def test_the_same_codes_give_the_same_bytes() -> None:
    codes = laplace(4, 1.0, 20, 90)
    streams = {encode([codes.astype(kind)], [MatrixForm(20, 90, 9, True)]) for kind in (np.int32, np.int64)}
    assert len(streams) == 1
    # What other machines wrote: a stream that no longer comes out the same cannot be read there.
    assert zlib.crc32(streams.pop()) == 1_154_892_069


def test_every_changed_or_missing_byte_is_noticed() -> None:
    form = MatrixForm(9, 31)
    stream = encode([laplace(5, 1.0, 9, 31)], [form])
    for place in range(len(stream)):
        with pytest.raises(CodingError):
            decode(stream[:place] + bytes([stream[place] ^ 4]) + stream[place + 1 :], [form])
        with pytest.raises(CodingError):
            decode(stream[:place], [form])


def test_a_stream_of_other_matrices_raises_or_gives_codes_of_the_shapes_asked_for() -> None:
    rng = np.random.default_rng(6)
    for _ in range(100):  # right checksums over what no encoder wrote
        payload = rng.integers(0, 256, int(rng.integers(0, 90)), dtype=np.uint8).tobytes()
        stream = struct.pack("<4sII", b"CAQ1", len(payload), zlib.crc32(payload)) + payload
        try:
            found = decode(stream, [MatrixForm(5, 6), MatrixForm(2, 9, 9, True)])
        except CodingError:
            continue
        assert [x.shape for x in found] == [(5, 6), (2, 9)]
    stream = encode([laplace(7, 2.0, 12, 40)], [MatrixForm(12, 40)])
    with pytest.raises(CodingError, match="more than these"):
        decode(stream, [MatrixForm(12, 39)])


def test_codes_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(CodingError, match=str(LIMIT)):
        encode([np.array([[LIMIT]])], [MatrixForm(1, 1)])
    with pytest.raises(CodingError, match="announced"):
        encode([np.zeros((2, 3), dtype=np.int64)], [MatrixForm(3, 2)])
