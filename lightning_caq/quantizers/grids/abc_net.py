"""ABC-Net: sums of binary bases cut at multiples of the deviation (Lin, Zhao & Pan 2017, §3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.basis import fit_basis
from lightning_caq.quantizers.grids.levels import levels


def abc_net_basis(rows: Tensor, bits: int) -> Tensor:
    """The coefficients α that minimise ‖w − Σ_k α_k B_k‖², with the paper's bases B_k = sign(w − mean + u_k · std).

    The shifts u_k are evenly spaced from −1 to 1. In the paper a weight keeps the signs of these bases, which makes
    b + 1 different values; here it may take any of the 2^b sums, in the same bits and never with a larger error.

    Args:
        rows: Weights, float64, shape (channels, weights).
        bits: Number of bases b, 1 to 8.

    Returns:
        The coefficients, float64, shape (channels, b).

    Example:
        >>> abc_net_basis(torch.tensor([[-1.0, -1.0, 1.0, 1.0]], dtype=torch.float64), 1)
        tensor([[1.0000]], dtype=torch.float64)
    """
    centred = rows - rows.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    shifts = torch.linspace(-1, 1, bits) if bits > 1 else torch.zeros(1)
    codes = sum((centred + u * deviation >= 0).long() << k for k, u in enumerate(shifts.tolist()))
    assert isinstance(codes, Tensor)
    return fit_basis(rows, codes, levels("abc_net", bits).to(rows))
