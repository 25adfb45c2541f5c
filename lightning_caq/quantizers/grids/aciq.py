"""ACIQ: the clipping that is best for a Laplace or a Gauss distribution, in closed form (Banner et al. 2019, §3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def laplace_clip(bits: int) -> float:
    """Optimal clip of a Laplace distribution, in units of its scale β = E|w − μ|.

    It minimises 2 β² e^(−α/β) + α² / (3 · 4^b): what is cut off, and the noise of 2^b even steps between −α and α.
    The optimum solves (α/β) e^(α/β) = 3 · 4^b.

    Args:
        bits: Bit-width b.

    Example:
        >>> [round(laplace_clip(b), 2) for b in (2, 3, 4)]
        [2.83, 3.9, 5.03]
    """
    return _root(lambda x: math.log(x) + x - math.log(3 * 4**bits))


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
    return _root(
        lambda x: x * math.erfc(x / math.sqrt(2)) + x / (3 * 4**bits) - math.sqrt(2 / math.pi) * math.exp(-x * x / 2)
    )


def clipping(rows: Tensor, bits: int, centred: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel's grid.

    Of the two distributions the one is taken under which the channel is likelier. The range μ ± α is cut into 2^b even
    parts with a value in the middle of each; it reaches no further than the weights.

    Args:
        rows: Weights, float64, shape (channels, weights).
        bits: Bit-width b, 1 to 8.
        centred: Whether the range is centred on zero rather than on the mean of the channel.

    Returns:
        Both, shape (channels, 1).
    """
    mean = torch.zeros_like(rows[:, :1]) if centred else rows.mean(1, keepdim=True)
    away = (rows - mean).abs()
    beta, sigma = away.mean(1, keepdim=True), away.square().mean(1, keepdim=True).sqrt()
    laplace = (2 * beta).log() + 1 < (2 * math.pi * sigma.square()).log() / 2 + 0.5  # −log likelihood of one weight
    clip = torch.where(laplace, laplace_clip(bits) * beta, gauss_clip(bits) * sigma)
    reach = torch.minimum(clip, away.amax(1, keepdim=True)) * (1 - 2.0**-bits)
    return mean - reach, mean + reach


def _root(f: Callable[[float], float]) -> float:
    """Where a function that is negative near zero and grows changes sign, by bisection."""
    low, high = 1e-6, 64.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return low
