"""Series expansion: a sum of low-bit tensors, each of what the ones before left (FP=xINT, Zhang et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.sizes import term_bits


def series_basis(rows: Tensor, bits: int) -> Tensor:
    """The scales of the terms: w ≈ Σ_i s_i M_i, where M_i has two bits, and the last one a single bit if b is odd.

    Each term rounds the residual of the ones before on a range that just holds it. A term of x bits leaves at most
    max |residual| / 2^x, so all of them leave at most max |w| / 2^b. All terms are stored and count: b bits a weight.

    Args:
        rows: Weights, float64, shape (channels, weights).
        bits: Bits of all terms together, b, 1 to 8.

    Returns:
        The scales, float64, shape (channels, terms).

    Example:
        >>> series_basis(torch.tensor([[-8.0, -1.0, 4.0, 8.0]], dtype=torch.float64), 4)
        tensor([[4., 1.]], dtype=torch.float64)
    """
    residual, scales = rows, []
    for width in term_bits(bits):
        scale = residual.abs().amax(1, keepdim=True).clamp_min(1e-30) / 2 ** (width - 1)
        top = 2**width - 1
        residual = residual - scale * ((residual / scale + top / 2).round().clamp(0, top) - top / 2)
        scales.append(scale)
    return torch.cat(scales, 1)
