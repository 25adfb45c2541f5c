"""ACIQ: the clipping that is best for a Laplace or a Gauss distribution, in closed form (Banner et al. 2019, §3)."""

from __future__ import annotations

import math
from functools import cache

import torch
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor


@cache
def laplace_clip(bits: int) -> float:
    """Optimal clip of a Laplace distribution, in units of its scale β = E|w − μ|.

    It minimises 2 β² e^(−α/β) + α² / (3 · 4^b): what is cut off, and the noise of 2^b even steps between −α and α.
    The optimum solves (α/β) e^(α/β) = 3 · 4^b, so it is Lambert's W.

    Args:
        bits: Bit-width b.

    Example:
        >>> [round(laplace_clip(b), 2) for b in (2, 3, 4)]
        [2.83, 3.9, 5.03]
    """
    return float(lambertw(3 * 4**bits).real)


@cache
def gauss_clip(bits: int) -> float:
    """Optimal clip of a Gauss distribution, in units of its deviation σ.

    It minimises (α² + σ²) erfc(α / √2σ) − √(2/π) α σ e^(−α²/2σ²) + α² / (3 · 4^b). The optimum solves
    α erfc(α / √2) + α / (3 · 4^b) = √(2/π) e^(−α²/2) for σ = 1.

    Args:
        bits: Bit-width b.

    Example:
        >>> [round(gauss_clip(b), 2) for b in (2, 3, 4)]
        [1.71, 2.15, 2.56]
    """

    def slope(x: float) -> float:
        noise = x * math.erfc(x / math.sqrt(2)) + x / (3 * 4.0**bits)
        return noise - math.sqrt(2 / math.pi) * math.exp(-x * x / 2)

    root: float = brentq(slope, 1e-6, 64.0, xtol=1e-15)
    return root


def clipping(rows: Tensor, widths: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel's grid.

    Of the two distributions the one is taken under which the channel is likelier. The range μ ± α is cut into 2^b even
    parts with a value in the middle of each; it reaches no further than the weights.

    Args:
        rows: Weights, float64, shape (channels, weights).
        widths: Bit-width of each channel, 1 to 8, whole numbers, shape (channels, 1) or (1, 1).
        centred: Whether the range is centred on zero rather than on the mean of the channel.

    Returns:
        Both, shape (channels, 1).
    """
    mean = torch.zeros_like(rows[:, :1]) if centred else rows.mean(1, keepdim=True)
    away = (rows - mean).abs()
    beta, sigma = away.mean(1, keepdim=True), away.square().mean(1, keepdim=True).sqrt()
    laplace = (2 * beta).log() + 1 < (2 * math.pi * sigma.square()).log() / 2 + 0.5  # −log likelihood of one weight
    by_laplace, by_gauss = (
        torch.tensor([clip(b) for b in widths.flatten().tolist()]).to(rows).reshape(widths.shape)
        for clip in (laplace_clip, gauss_clip)
    )
    clip = torch.where(laplace, by_laplace * beta, by_gauss * sigma)
    reach = torch.minimum(clip, away.amax(1, keepdim=True)) * (1 - 2.0**-widths)
    return mean - reach, mean + reach
