"""Affine grids: evenly spaced values, one scale and one zero point an output channel, or a group of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.groups import spread
from lightning_caq.quantizers.grids.least_squares import Pair, in_type, search_grid, whole_zero_grid
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
    rounds a symmetric channel better at 2 bits. Those of groups lie within the codes, so that b + 1 bits hold them.

    Attributes:
        bits: Bit-width b, 1 to 8; the largest one where channels differ.
        scale: Step between neighbouring values, in the type that it is stored in and in a shape that broadcasts to the
            weight; with groups (*that shape, groups).
        zero_point: Code, or half-way between two codes, that stands for 0; float32, same shape.
        channel_bits: Bit-width of each channel, uint8, same shape; ``None`` where all have ``bits``.
        group_size: Weights of a channel that share a scale and a zero point; ``None`` where all do.
    """

    quantizer: ClassVar[str] = "affine"
    bits: int
    scale: Tensor
    zero_point: Tensor
    channel_bits: Tensor | None = None
    group_size: int | None = None

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
        return top.to(self.zero_point)

    def per_weight(self, shape: Sequence[int]) -> Pair:
        """Scale, float32, and zero point of each weight, in a shape that broadcasts to the weight's."""
        scale = self.scale.float()
        if self.group_size is None:
            return scale, self.zero_point
        return spread(scale, self.group_size, shape), spread(self.zero_point, self.group_size, shape)

    def tolerance(self, shape: Sequence[int]) -> Tensor:
        """How far a stored weight may be from its value for rounding's sake, in a shape that broadcasts to its own."""
        return 1e-5 * self.per_weight(shape)[0] * (self.top + 1)

    def to(self, device: torch.device | str) -> Grid:
        """The grid on another device."""
        channel_bits = None if self.channel_bits is None else self.channel_bits.to(device)
        return replace(
            self, scale=self.scale.to(device), zero_point=self.zero_point.to(device), channel_bits=channel_bits
        )

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values, float32 whole numbers in the shape of ``weight``."""
        scale, zero_point = self.per_weight(weight.shape)
        codes = (weight.float() / scale + zero_point).round()
        return codes.clamp(0, 2**self.bits - 1) if self.channel_bits is None else codes.clamp(min=0).minimum(self.top)

    def values(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, float32."""
        scale, zero_point = self.per_weight(codes.shape)
        return scale * (codes.float() - zero_point)

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
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Grid:
    """An affine grid for a weight, its range chosen channel by channel, or group by group, by one of the field's rules.

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
        group_size: Weights of a channel that share a scale and a zero point, for one bit-width; all by default.
        scale_dtype: Type that scales are stored in, and rounded to before anything is judged by them.

    Returns:
        The grid. A channel or group that holds one value only gets a grid on which that value lies.

    Example:
        >>> w = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-2.0, -2.0, -2.0, -2.0]])
        >>> grid = fit_grid(w, bits=2, channel_shape=(2, 1))
        >>> bool(torch.allclose(grid.nearest(w), w, atol=1e-6))
        True
        >>> fit_grid(w[:1], 2, (1, 1), range="minmax", symmetry="mid_rise").values(torch.arange(4)[None])
        tensor([[-3., -1.,  1.,  3.]])
    """
    rows = channel_rows(weight, channel_shape)
    weights = channel_rows(importance, channel_shape) if range == "curvature" and importance is not None else None
    widths = torch.tensor(bits, device=rows.device).reshape(-1, 1)
    rule = _Rule(widths, range, symmetry, in_codes=group_size is not None, scale_dtype=scale_dtype)
    if group_size is not None:
        assert isinstance(bits, int)
        parts = rows.split(group_size, 1)
        of_parts = [None] * len(parts) if weights is None else weights.split(group_size, 1)
        pairs = [rule.fit(*part) for part in zip(parts, of_parts, strict=True)]
        return joined_groups(bits, pairs, channel_shape, group_size)
    scale, zero_point = (x.reshape(channel_shape) for x in rule.fit(rows, weights))
    if isinstance(bits, int):
        return Grid(bits, scale, zero_point)
    return Grid(max(bits), scale, zero_point, widths.to(torch.uint8).reshape(channel_shape))


@dataclass(frozen=True)
class _Rule:
    """How the scale and the zero point of some weights are fitted; see ``fit_grid``.

    Attributes:
        widths: Bit-width of each row, shape (rows, 1) or (1, 1).
        range: Where a grid begins and ends.
        symmetry: Where its zero lies.
        in_codes: Whether the zero point has to lie within the codes.
        scale_dtype: Type of scales.
    """

    widths: Tensor
    range: str
    symmetry: str
    in_codes: bool
    scale_dtype: torch.dtype

    def fit(self, rows: Tensor, importance: Tensor | None) -> Pair:
        """Scale, in its type, and zero point, float32, of each row of weights, shape (rows, 1)."""
        top, fixed = (2**self.widths - 1).double(), fixed_zero_point(self.widths, self.symmetry)
        low, high = range_ends(rows, self.widths, self.range, centred=fixed is not None)
        scale, zero_point = spanning_grid(low, high, top, fixed)
        pair = self._searched(rows, top, (scale, zero_point), fixed is not None, importance)
        if self.symmetry == SIGNED_BYTE:
            pair = signed_byte_grid(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), top, pair)
            pair = self._searched(rows, top, pair, True, importance)
        scale, zero_point = pair
        if self.in_codes and bool((outside := (zero_point < 0) | (zero_point > top)).any()):
            inside = whole_zero_grid(rows, top, (scale, zero_point), scale_dtype=self.scale_dtype)
            scale, zero_point = (torch.where(outside, *x) for x in zip(inside, (scale, zero_point), strict=True))
        return in_type(scale, self.scale_dtype), zero_point.float()

    def _searched(self, rows: Tensor, top: Tensor, pair: Pair, zero_is_fixed: bool, importance: Tensor | None) -> Pair:
        """The grid of least error near another one, where the range is searched for; else that one."""
        if self.range not in ("mse", "curvature"):
            return pair
        return search_grid(rows, top, pair, zero_is_fixed, importance, scale_dtype=self.scale_dtype)


def joined_groups(bits: int, pairs: Sequence[Pair], channel_shape: tuple[int, ...], group_size: int) -> Grid:
    """The grid of a weight from the scales and zero points of its groups, each of shape (channels, 1)."""
    scale, zero_point = (torch.cat(parts, 1).reshape(*channel_shape, -1) for parts in zip(*pairs, strict=True))
    return Grid(bits, scale, zero_point, group_size=group_size)


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
