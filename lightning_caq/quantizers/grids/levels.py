"""Levels: what a code stands for in the quantizers that are no affine grid.

All of their tables are linear in a few stored numbers, the basis v: value of code c = Σ_k v_k · levels[k, c]. Only the
basis is stored; the levels follow from the name of the quantizer and the bit-width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.sizes import term_bits


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
