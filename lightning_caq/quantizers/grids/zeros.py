"""Zeros of a pruned weight: which of them are kept, and grids that hold the value zero."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.affine import Grid, channel_rows, joined_groups
from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.grids.least_squares import Pair, in_type, whole_zero_grid

PRUNED = 0.2  # of the weights; a layer with more exact zeros was pruned


def kept_zeros(weight: Tensor, keep: bool | None) -> Tensor | None:
    """Where exact zeros have to stay zero, bool in the shape of the weight; ``None`` where none has to.

    Args:
        weight: The weight.
        keep: Whether zeros are kept; ``None`` keeps them where more than a fifth of the weights is zero.

    Example:
        >>> kept_zeros(torch.tensor([0.0, 1.0, 2.0]), None)
        tensor([ True, False, False])
        >>> kept_zeros(torch.tensor([1.0, 2.0]), None)
    """
    zeros = weight == 0
    share = float(zeros.float().mean())
    return zeros if share > (PRUNED if keep is None else 0) and keep is not False else None


def with_zero(values: Grid | Codebook, weight: Tensor, zeros: Tensor) -> Grid | Codebook:
    """Values of which one is zero, wherever a zero has to be kept.

    The zero point of an affine grid moves to a whole code, the scale follows by least squares. In a codebook the value
    next to zero becomes zero.

    Args:
        values: The values that were fitted; one grid a channel, or one table for all.
        weight: The weight that is rounded.
        zeros: Which of its weights have to be zero.

    Example:
        >>> grid = Grid(2, torch.tensor([[1.0]]), torch.tensor([[1.5]]))
        >>> with_zero(grid, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), torch.tensor([[False, True, False, False]]))
        Grid(bits=2, scale=tensor([[1.]]), zero_point=tensor([[1.]]), channel_bits=None, group_size=None)
    """
    if isinstance(values, Codebook):
        nearest = values.basis.abs() == values.basis.abs().amin(-1, keepdim=True)
        return Codebook.of(values.quantizer, values.bits, values.basis.masked_fill(nearest, 0.0))
    size = values.group_size
    shape = tuple(values.scale.shape if size is None else values.scale.shape[:-1])
    rows, kept = channel_rows(weight, shape), channel_rows(zeros, shape)
    top = values.top.double().expand(shape).reshape(-1, 1)
    if size is None:
        pair = _with_zero(rows, top, (values.scale.reshape(-1, 1), values.zero_point.reshape(-1, 1)), kept)
        scale, zero_point = (x.reshape(shape) for x in pair)
        return replace(values, scale=scale, zero_point=zero_point)
    of_groups = (x.flatten(0, -2).split(1, 1) for x in (values.scale, values.zero_point))
    parts = zip(rows.split(size, 1), zip(*of_groups, strict=True), kept.split(size, 1), strict=True)
    return joined_groups(values.bits, [_with_zero(part, top, *rest) for part, *rest in parts], shape, size)


def _with_zero(rows: Tensor, top: Tensor, pair: Pair, zeros: Tensor) -> Pair:
    """Scale and zero point of each row, the latter a whole code in the rows that have zeros to keep."""
    scale, zero_point = pair
    here, dtype = zeros.any(1, keepdim=True), scale.dtype
    new_scale, new_zero = whole_zero_grid(rows, top, (scale.double(), zero_point.double()), scale_dtype=dtype)
    return torch.where(here, in_type(new_scale, dtype), scale), torch.where(here, new_zero.float(), zero_point)
