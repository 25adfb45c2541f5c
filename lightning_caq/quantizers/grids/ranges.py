"""Ranges: where an affine grid begins and ends, channel by channel, and the scale and zero point that reach there."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.aciq import clipping

RANGES = ("mse", "minmax", "percentile", "aciq", "curvature")
SYMMETRIES = ("asymmetric", "symmetric", "mid_rise")
SIGNED_BYTE = "signed_byte"  # what a runtime asks for, rather than a user
LARGEST_ZERO_POINT = 16_000.0
_PERCENTILE = 0.999


def range_ends(rows: Tensor, widths: Tensor, range: str, centred: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value that each channel's grid has to reach.

    Args:
        rows: Weights, float64, shape (channels, weights).
        widths: Bit-width of each channel, whole numbers, shape (channels, 1) or (1, 1).
        range: A name of ``RANGES``; those that search begin with every weight.
        centred: Whether ``"aciq"`` centres the range on zero rather than on the mean of the channel.

    Returns:
        Both, shape (channels, 1).

    Example:
        >>> range_ends(torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[2]]), "minmax", centred=False)
        (tensor([[-1.]]), tensor([[2.]]))
    """
    if range == "percentile":
        return _quantile(rows, 1 - _PERCENTILE), _quantile(rows, _PERCENTILE)
    if range == "aciq":
        return clipping(rows, widths, centred)
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def fixed_zero_point(widths: Tensor, symmetry: str) -> Tensor | None:
    """The zero point that a symmetry asks for, or ``None`` where it may lie anywhere.

    Args:
        widths: Bit-width of each channel, whole numbers.
        symmetry: A name of ``SYMMETRIES``, or ``SIGNED_BYTE``, which depends on where zero would lie otherwise.

    Returns:
        Float64, in the shape of ``widths``.

    Example:
        >>> fixed_zero_point(torch.tensor([[2]]), "symmetric"), fixed_zero_point(torch.tensor([[2]]), "mid_rise")
        (tensor([[2.]], dtype=torch.float64), tensor([[1.5000]], dtype=torch.float64))
    """
    codes = (2**widths).double()
    return {"symmetric": codes / 2, "mid_rise": (codes - 1) / 2}.get(symmetry)


def spanning_grid(low: Tensor, high: Tensor, top: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the narrowest grid that reaches from ``low`` to ``high``.

    A channel that holds one value only gets a grid on which that value lies.

    Args:
        low: Smallest value of each channel, float64, shape (channels, 1).
        high: The largest.
        top: The largest code of each channel, 2^b − 1.
        zero_point: The zero point, if it is fixed.

    Returns:
        Both, float64, shape (channels, 1); zero points are multiples of one half.

    Example:
        >>> low, high, top = (torch.tensor([[x]]).double() for x in (-1.0, 2.0, 3.0))
        >>> [x.item() for x in spanning_grid(low, high, top, None)]
        [1.0, 1.0]
    """
    largest = torch.maximum(low.abs(), high.abs())
    if zero_point is not None:
        # With one bit a symmetric grid has no value above zero.
        above = torch.where(top > zero_point, high / (top - zero_point), 0.0)
        needed = torch.maximum(above, -low / zero_point)
        scale = torch.where(needed > 0, needed, largest).clamp_min(1e-30)
        return scale, zero_point.expand_as(scale)
    constant = high <= low
    # A constant channel c is stored as code 1 of the values 0, |c|, … (or their negatives).
    scale = torch.maximum((high - low) / top, smallest_scale(low, high))
    scale = torch.where(constant, largest.clamp_min(1e-30), scale)
    return scale, to_halves(torch.where(constant, torch.where(low < 0, top, 0.0), -low / scale))


def signed_byte_grid(low: Tensor, high: Tensor, top: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A grid near another one whose codes less zero point fit into a signed byte, as integer kernels want weights.

    Zero becomes one of its ends or lies between them. With 8 bits it is the code 128; with 4 and 7 bits it is a whole
    code, since doubled codes would take a wider type.

    Args:
        low: Smallest value of each channel, float64, shape (channels, 1).
        high: The largest.
        top: The largest code of each channel, 2^b − 1.
        pair: Scale and zero point of the other grid.

    Returns:
        Both, float64, shape (channels, 1). Where the zero point had to move, the grid reaches from ``low`` to ``high``.

    Example:
        >>> low, high, top = (torch.tensor([[x]]).double() for x in (1.0, 3.0, 15.0))
        >>> [x.item() for x in signed_byte_grid(low, high, top, (torch.tensor([[0.1]]), torch.tensor([[-7.5]])))]
        [0.2, 0.0]
    """
    scale, zero = pair
    whole = torch.where((top == 15) | (top == 127), zero.round(), zero).clamp(min=0).minimum(top)
    whole = torch.where(top == 255, 128.0, whole)
    above = torch.where(top > whole, high.clamp(min=0) / (top - whole).clamp_min(0.5), 0.0)
    below = torch.where(whole > 0, -low.clamp(max=0) / whole.clamp_min(0.5), 0.0)
    reaching = torch.maximum(above, below)
    return torch.where((whole == zero) | (reaching == 0), scale.to(reaching), reaching), whole.to(reaching)


def smallest_scale(low: Tensor, high: Tensor) -> Tensor:
    """The least step with which the zero point of a narrow range far from zero still fits into its 16 bits."""
    return torch.maximum(low.abs(), high.abs()) / LARGEST_ZERO_POINT


def to_halves(zero_point: Tensor) -> Tensor:
    """The nearest zero points that can be stored.

    Example:
        >>> to_halves(torch.tensor([1.3, 1.2, 1e9]))
        tensor([1.5000e+00, 1.0000e+00, 1.6000e+04])
    """
    return ((2 * zero_point).round() / 2).clamp(-LARGEST_ZERO_POINT, LARGEST_ZERO_POINT)


def _quantile(rows: Tensor, part: float) -> Tensor:
    """Quantile of each row, between two weights by interpolation; ``Tensor.quantile`` takes no large rows."""
    ascending, place = rows.sort(1).values, part * (rows.shape[1] - 1)
    below = int(place)
    above = min(below + 1, rows.shape[1] - 1)
    return ascending[:, below, None].lerp(ascending[:, above, None], place - below)
