"""Deep-Compression codebooks: the k-means centres of a layer's weights (Han, Mao & Dally 2016, §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.basis import refine_basis
from lightning_caq.quantizers.grids.levels import levels

_ROUNDS = 300


def kmeans_basis(rows: Tensor, bits: int) -> Tensor:
    """2^b shared values by k-means, started on even spacing between the smallest and the largest weight.

    Even spacing keeps values for the few large weights, which matter more than their number says (the paper's linear
    initialisation). The paper trains the shared values afterwards; here they are what the weights alone give.

    Args:
        rows: Weights, float64, shape (1, weights).
        bits: Bit-width b, 1 to 8.

    Returns:
        The values, float64, shape (1, 2^b).

    Example:
        >>> kmeans_basis(torch.tensor([[0.0, 1.0, 8.0, 9.0]], dtype=torch.float64), 1)
        tensor([[0.5000, 8.5000]], dtype=torch.float64)
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    start = low + (high - low) * torch.linspace(0, 1, 2**bits).to(rows)
    return refine_basis(rows, start, levels("codebook", bits).to(rows), _ROUNDS)
