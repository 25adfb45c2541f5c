"""Levels: what a code stands for in the quantizers that are no affine grid.

All of their tables are linear in a few stored numbers, the basis v: value of code c = Σ_k v_k · levels[k, c]. Only the
basis is stored; the levels follow from the name of the quantizer and the bit-width.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODEBOOKS = ("codebook", "lq_nets", "abc_net", "series", "dorefa")
PER_LAYER = ("codebook", "dorefa")  # one basis a layer; the others have one a channel
TERM_BITS = 2  # of a term of a series


def levels(quantizer: str, bits: int) -> Tensor:
    """What each number of the basis is multiplied by for each code.

    Args:
        quantizer: A name of ``CODEBOOKS``.
        bits: Bit-width b, 1 to 8.

    Returns:
        Float64, shape (numbers in the basis, 2^b).

    Example:
        >>> levels("lq_nets", 2)
        tensor([[-1.,  1., -1.,  1.],
                [-1., -1.,  1.,  1.]], dtype=torch.float64)
        >>> levels("dorefa", 2).shape, levels("codebook", 3).shape, levels("series", 3).shape
        (torch.Size([1, 4]), torch.Size([8, 8]), torch.Size([2, 8]))
    """
    if quantizer == "codebook":
        return torch.eye(2**bits, dtype=torch.float64)
    codes = torch.arange(2**bits)
    if quantizer == "dorefa":
        return torch.linspace(-1, 1, 2**bits, dtype=torch.float64)[None]
    digits, shift = [], 0
    for width in term_bits(bits) if quantizer == "series" else (1,) * bits:
        # A binary base is −1 or 1; a term of a series counts in whole steps, half a step away from zero.
        step, top = (1.0 if quantizer == "series" else 2.0), 2**width - 1
        digits.append(step * ((codes >> shift & top).double() - top / 2))
        shift += width
    return torch.stack(digits)


def term_bits(bits: int) -> tuple[int, ...]:
    """Bits of the terms of a series that takes ``bits`` bits a weight in all.

    Example:
        >>> term_bits(5)
        (2, 2, 1)
    """
    return (TERM_BITS,) * (bits // TERM_BITS) + (1,) * (bits % TERM_BITS)


def stored_numbers(quantizer: str, bits: int, channels: int) -> int:
    """Float32 numbers that the basis of one layer takes.

    Args:
        quantizer: A name of ``CODEBOOKS``.
        bits: Bit-width of the layer.
        channels: Its output channels.

    Example:
        >>> stored_numbers("lq_nets", 3, channels=16), stored_numbers("codebook", 3, channels=16)
        (48, 8)
    """
    return len(levels(quantizer, bits)) * (1 if quantizer in PER_LAYER else channels)
