"""Bytes of channels that differ in their bits, and of groups, against counting bit by bit."""

import math
from collections import Counter

import numpy as np
import pytest
from every import every

from lightning_caq.sizes import LayerSizes, average_bits, code_bytes, width_bits


@every("seed", range(5))
def test_bytes_and_averages(seed):
    draws = np.random.default_rng(seed)
    width = tuple(draws.integers(1, 9, 11).tolist())
    each = int(draws.integers(1, 30))
    per_width = Counter()
    for b in width:
        per_width[b] += b * each
    assert code_bytes(width, 11 * each) == sum(math.ceil(bits / 8) for bits in per_width.values())
    assert 8 * code_bytes(width, 11 * each) - sum(per_width.values()) < 8 * len(per_width)  # under a byte a width
    assert average_bits(width) == pytest.approx(np.mean(width))
    assert width_bits(width) == 40  # 33 bits in whole bytes


def test_one_width_is_as_before():
    assert (code_bytes(3, 11), average_bits(3), width_bits(3)) == (5, 3, 0)


@every("bits", range(1, 9))
def test_groups_by_hand(bits):
    """Three layers: 5 channels of 3 groups, 4 channels with one scale each, 10 channels of one group."""
    sizes = LayerSizes((5 * 150, 4 * 20, 10 * 60), (5, 4, 10), groups=(3, 0, 1), scale_bits=16)
    assert sizes.overhead == (15 + 4 + 10) * 16 + 4 * 16
    assert sizes.tables([bits] * 3) == sum(8 * math.ceil(count * (bits + 1) / 8) for count in (15, 10))
    stored = (750 + 80 + 600) * bits + sizes.overhead + sizes.tables([bits] * 3)
    assert sizes.ratio([bits] * 3) == pytest.approx(32 * 1430 / stored)


def test_scales_of_channels_in_sixteen_bits():
    whole, half = (LayerSizes((750,), (5,), scale_bits=bits).overhead for bits in (32, 16))
    assert (whole, half) == (5 * 48, 5 * 32)
