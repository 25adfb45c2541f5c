"""Affine grids: evenly spaced values, one scale and one zero point an output channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.least_squares import search_grid
from lightning_caq.quantizers.grids.ranges import (
    SIGNED_BYTE,
    fixed_zero_point,
    range_ends,
    signed_byte_grid,
    spanning_grid,
)
from lightning_caq.sizes import Width


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


def fit_grid(
    weight: Tensor,
    bits: Width,
    channel_shape: tuple[int, ...],
    *,
    range: str = "mse",
    symmetry: str = "asymmetric",
    importance: Tensor | None = None,
) -> Grid:
    """An affine grid for a weight, its range chosen channel by channel by one of the field's rules.

    ``"mse"`` looks for close to the least squared error, never more than that of the full range; ``"minmax"`` holds
    every weight; ``"percentile"`` leaves out a thousandth of the weights at either end (Wu et al. 2020); ``"aciq"``
    takes the optimum for a Laplace or a Gauss distribution (Banner et al. 2019); ``"curvature"`` looks for the least
    squared error weighted by ``importance``.

    Args:
        weight: The weight, any floating-point type.
        bits: Bit-width b, 1 to 8, or one a channel.
        channel_shape: Shape of one scale per channel, broadcastable to the weight, such as ``(16, 1, 1, 1)``.
        range: A name of ``ranges.RANGES``.
        symmetry: ``"asymmetric"`` lets the zero point lie where it is best; ``"symmetric"`` fixes it at the code
            2^(b−1), so that zero is a value; ``"mid_rise"`` between the two middle codes, so that values come in pairs;
            ``"signed_byte"`` keeps codes less zero point within −128 and 127, see ``ranges.signed_byte_grid``.
        importance: How much the squared error of each weight counts, same shape as the weight, for ``"curvature"``;
            without it all count the same.

    Returns:
        The grid. A channel that holds one value only gets a grid on which that value lies.

    Example:
        >>> w = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-2.0, -2.0, -2.0, -2.0]])
        >>> grid = fit_grid(w, bits=2, channel_shape=(2, 1))
        >>> bool(torch.allclose(grid.nearest(w), w, atol=1e-6))
        True
        >>> fit_grid(w[:1], 2, (1, 1), range="minmax", symmetry="mid_rise").values(torch.arange(4)[None])
        tensor([[-3., -1.,  1.,  3.]])
    """
    rows = channel_rows(weight, channel_shape)
    widths = torch.tensor(bits, device=rows.device).reshape(-1, 1)
    top, fixed = (2**widths - 1).double(), fixed_zero_point(widths, symmetry)
    low, high = range_ends(rows, widths, range, centred=fixed is not None)
    pair = spanning_grid(low, high, top, fixed)
    searches, weights = range in ("mse", "curvature"), None
    if searches:
        weights = channel_rows(importance, channel_shape) if range == "curvature" and importance is not None else None
        pair = search_grid(rows, top, pair, fixed is not None, weights)
    if symmetry == SIGNED_BYTE:
        pair = signed_byte_grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), top, pair)
        if searches:
            pair = search_grid(rows, top, pair, True, weights)
    scale, zero_point = (x.float().reshape(channel_shape) for x in pair)
    if isinstance(bits, int):
        return Grid(bits, scale, zero_point)
    return Grid(max(bits), scale, zero_point, widths.to(torch.uint8).reshape(channel_shape))


def channel_rows(values: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
    """Values with one row a channel, float64.

    Args:
        values: Values in the shape of a weight.
        channel_shape: Shape of one number per channel, broadcastable to it.

    Example:
        >>> channel_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (1, 2))
        tensor([[1., 3.],
                [2., 4.]], dtype=torch.float64)
    """
    axis = next((d for d, size in enumerate(channel_shape) if size > 1), 0)
    return values.detach().double().movedim(axis, 0).reshape(channel_shape[axis], -1)
