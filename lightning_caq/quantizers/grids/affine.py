"""Affine grids: evenly spaced values, one scale and one zero point an output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_caq.sizes import Width

# Ranges that are tried, as fractions of the full range, and shifts of their middle, in steps. Clipping pays at 2 and 3
# bits, hardly above, and more the heavier the tails; at a given step the two or three nearest zero points differ more
# than neighbouring fractions do.
_FRACTIONS = [0.1, 0.15, 0.2, 0.25, *torch.linspace(0.3, 1.05, 16).tolist()]
_SHIFTS = (-0.5, 0.0, 0.5)
_REFINEMENTS = 8
_LARGEST_ZERO_POINT = 16_000.0


@dataclass(frozen=True)
class Grid:
    """The values scale · (code − zero_point) for code = 0, …, 2^b − 1, for every channel.

    Zero points are multiples of one half: whole ones put a value on zero, the others put zero between two values, which
    rounds a symmetric channel better at 2 bits.

    Attributes:
        bits: Bit-width b, 1 to 8; the largest one where channels differ.
        scale: Step between neighbouring values, float32, in a shape that broadcasts to the weight.
        zero_point: Code, or half-way between two codes, that stands for 0; float32, same shape.
        channel_bits: Bit-width of each channel, uint8, same shape; ``None`` where all have ``bits``.
    """

    quantizer: ClassVar[str] = "affine"
    bits: int
    scale: Tensor
    zero_point: Tensor
    channel_bits: Tensor | None = None

    @property
    def width(self) -> Width:
        """The bits as one number, or as one a channel.

        Example:
            >>> ones = torch.ones(2, 1)
            >>> Grid(4, ones, ones).width, Grid(4, ones, ones, torch.tensor([[2], [4]], dtype=torch.uint8)).width
            (4, (2, 4))
        """
        return self.bits if self.channel_bits is None else tuple(self.channel_bits.flatten().tolist())

    @property
    def top(self) -> Tensor:
        """The largest code of each channel, float32, in a shape that broadcasts to the weight."""
        bits = torch.tensor(self.bits) if self.channel_bits is None else self.channel_bits.int()
        top: Tensor = 2**bits - 1
        return top.to(self.scale)

    @property
    def tolerance(self) -> Tensor:
        """How far a stored weight may be from its value for rounding's sake, in a shape that broadcasts to it."""
        return 1e-5 * self.scale * (self.top + 1)

    def to(self, device: torch.device | str) -> Grid:
        """The grid on another device."""
        channel_bits = None if self.channel_bits is None else self.channel_bits.to(device)
        return Grid(self.bits, self.scale.to(device), self.zero_point.to(device), channel_bits)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values, float32 whole numbers in the shape of ``weight``."""
        codes = (weight.float() / self.scale + self.zero_point).round()
        return codes.clamp(0, 2**self.bits - 1) if self.channel_bits is None else codes.clamp(min=0).minimum(self.top)

    def values(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, float32."""
        return self.scale * (codes.float() - self.zero_point)

    def nearest(self, weight: Tensor) -> Tensor:
        """Q_b(W): the weight rounded to the nearest values of the grid, float32.

        Example:
            >>> grid = Grid(2, torch.tensor([[0.5]]), torch.tensor([[1.0]]))
            >>> grid.nearest(torch.tensor([[-0.6, 0.1, 0.4, 9.0]]))
            tensor([[-0.5000,  0.0000,  0.5000,  1.0000]])
        """
        return self.values(self.codes(weight))


def fit_grid(weight: Tensor, bits: Width, channel_shape: tuple[int, ...]) -> Grid:
    """A grid that rounds a weight with close to the least squared error, channel by channel.

    The range is first shrunk step by step from the channel's minimum and maximum towards its mean, and shifted; the
    best is refined: with the codes held, scale and zero point follow from a linear regression of the weights on the
    codes, and new codes from these (Lloyd's iteration on an evenly spaced grid). The best grid seen is returned, so the
    error never exceeds that of the full range.

    Args:
        weight: The weight, any floating-point type.
        bits: Bit-width b, 1 to 8, or one a channel.
        channel_shape: Shape of one scale per channel, broadcastable to the weight, such as ``(16, 1, 1, 1)``.

    Returns:
        The grid. A channel that holds one value only gets a grid on which that value lies.

    Example:
        >>> w = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-2.0, -2.0, -2.0, -2.0]])
        >>> grid = fit_grid(w, bits=2, channel_shape=(2, 1))
        >>> bool(torch.allclose(grid.nearest(w), w, atol=1e-6))
        True
    """
    rows = _rows(weight.detach().double(), channel_shape)
    widths = torch.tensor(bits, device=rows.device).reshape(-1, 1)
    top = (2**widths - 1).double()
    low, high, mean = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), rows.mean(1, keepdim=True)
    constant = high <= low
    # A constant channel c is stored as code 1 of the values 0, |c|, … (or their negatives).
    # A narrow range far from zero gets a wider step: the zero point reaches it only so.
    least = torch.maximum(low.abs(), high.abs()) / _LARGEST_ZERO_POINT
    step = torch.where(constant, low.abs().clamp_min(1e-30), torch.maximum((high - low) / top, least))
    best = _Best(rows, top, step, _halves(torch.where(constant, torch.where(low < 0, top, 0.0), -low / step)))
    for fraction in _FRACTIONS:
        scale = torch.where(constant, step, torch.maximum(step * fraction, least))
        # Outliers on one side move the middle of the range away from where most weights lie; cut off, they should not.
        centre = torch.where(constant, 0.0, mean + min(fraction, 1.0) * ((low + high) / 2 - mean))
        zero = torch.where(constant, best.zero, top / 2 - centre / scale)
        for shift in _SHIFTS:
            best.offer(scale, torch.where(constant, zero, zero + shift))
    for _ in range(_REFINEMENTS):
        best.offer(*_regress(rows, best.codes(), best.scale, best.zero))
    scale, zero = (x.float().reshape(channel_shape) for x in (best.scale, best.zero))
    if isinstance(bits, int):
        return Grid(bits, scale, zero)
    return Grid(max(bits), scale, zero, widths.to(torch.uint8).reshape(channel_shape))


class _Best:
    """The best scale and zero point seen so far of each channel."""

    def __init__(self, rows: Tensor, top: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.rows, self.top, self.scale, self.zero = rows, top, scale, zero
        self.error = self._error(scale, zero)

    def codes(self) -> Tensor:
        return self._codes(self.scale, self.zero)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take a scale and a zero point where they round better."""
        scale, zero = scale.float().double(), _halves(zero)  # judge the numbers that will be stored
        error = self._error(scale, zero)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        codes = self._codes(scale, zero)
        return (scale * (codes - zero) - self.rows).square().sum(1, keepdim=True)

    def _codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        return (self.rows / scale + zero).round().clamp_(min=0).minimum(self.top)


def _regress(rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and zero point for codes that are held; the old ones where the codes do not differ."""
    q, w = codes - codes.mean(1, keepdim=True), rows - rows.mean(1, keepdim=True)
    spread = q.square().sum(1, keepdim=True)
    slope = (q * w).sum(1, keepdim=True) / spread.clamp_min(1e-12)
    usable = (spread > 0) & (slope > 0)
    slope = torch.where(usable, slope, scale)
    zero = torch.where(usable, codes.mean(1, keepdim=True) - rows.mean(1, keepdim=True) / slope, zero)
    zero = _halves(zero)
    centred = codes - zero
    weight = centred.square().sum(1, keepdim=True)
    best = (centred * rows).sum(1, keepdim=True) / weight.clamp_min(1e-12)
    return torch.where((weight > 0) & (best > 0), best, slope), zero


def _halves(zero: Tensor) -> Tensor:
    return ((2 * zero).round() / 2).clamp(-_LARGEST_ZERO_POINT, _LARGEST_ZERO_POINT)


def _rows(weight: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
    """The weight with one row a channel."""
    axis = next((d for d, size in enumerate(channel_shape) if size > 1), 0)
    return weight.movedim(axis, 0).reshape(channel_shape[axis], -1)
