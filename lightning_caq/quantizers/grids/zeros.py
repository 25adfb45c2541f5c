"""Zeros of a pruned weight: which of them are kept, and grids that hold the value zero."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.affine import Grid, channel_rows
from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.grids.least_squares import least_squares_grid

PRUNED = 0.2  # of the weights; a layer with more exact zeros was pruned
_FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the range that holds every weight


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
        Grid(bits=2, scale=tensor([[1.]]), zero_point=tensor([[1.]]), channel_bits=None)
    """
    if isinstance(values, Codebook):
        nearest = values.basis.abs() == values.basis.abs().amin(-1, keepdim=True)
        return Codebook.of(values.quantizer, values.bits, values.basis.masked_fill(nearest, 0.0))
    shape = tuple(values.scale.shape)
    rows, held = channel_rows(weight, shape), channel_rows(zeros, shape).any(1, keepdim=True)
    scale, zero, top = (x.double().reshape(-1, 1) for x in (values.scale, values.zero_point, values.top.expand(shape)))
    above, below = rows.amax(1, keepdim=True).clamp_min(0), (-rows.amin(1, keepdim=True)).clamp_min(0)
    starts = []
    for whole in (zero.floor().clamp_min(0).minimum(top), zero.ceil().clamp_min(0).minimum(top)):
        full = torch.maximum(above / (top - whole).clamp_min(0.5), below / whole.clamp_min(0.5))
        full = torch.where(full > 0, full, scale)
        starts += [(scale, whole), *((full * fraction, whole) for fraction in _FRACTIONS)]
    new_scale, new_zero = least_squares_grid(rows, top, starts, zero_is_fixed=True)
    return replace(
        values,
        scale=torch.where(held, new_scale, scale).float().reshape(shape),
        zero_point=torch.where(held, new_zero, zero).float().reshape(shape),
    )
