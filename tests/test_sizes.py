"""Bytes of channels that differ in their bits, against counting bit by bit."""

import math
from collections import Counter

import numpy as np
import pytest
from every import every

from lightning_caq.sizes import average_bits, code_bytes, width_bits


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
