"""LQ-Nets: sums of binary bases whose coefficients are learned (Zhang, Yang, Ye & Hua 2018, §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.basis import refine_basis, squared_errors
from lightning_caq.quantizers.grids.levels import levels

_ROUNDS = 50
_FRACTIONS = torch.linspace(0.2, 1.0, 17).tolist()


def lq_nets_basis(rows: Tensor, bits: int) -> Tensor:
    """The basis v that minimises Σ (w − Σ_k ±v_k)², by turns of nearest signs and least squares.

    It starts as the evenly spaced values, symmetric about zero, that round best, of which it is a generalisation:
    v_k = 2^k v_0.

    Args:
        rows: Weights, float64, shape (channels, weights).
        bits: Bit-width b, the number of bases, 1 to 8.

    Returns:
        The bases, float64, shape (channels, b).

    Example:
        >>> rows = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64)
        >>> lq_nets_basis(rows, 2)
        tensor([[1.0000, 2.0000]], dtype=torch.float64)
    """
    signs = levels("lq_nets", bits).to(rows)
    # A range up to f · max |w| that is cut into 2^b parts, a value in the middle of each.
    even = rows.abs().amax(1, keepdim=True) * 2.0 ** (torch.arange(bits) - bits).to(rows)
    errors = torch.stack([squared_errors(rows, (f * even) @ signs) for f in _FRACTIONS])
    best = torch.tensor(_FRACTIONS).to(rows)[errors.argmin(0)]
    return refine_basis(rows, best[:, None] * even, signs, _ROUNDS)
