"""Descent: better codes and scales for a rounded layer, by steps that can only lower its output error.

The error is the damped squared error of the layer's outputs, Σ over output channels of e H eᵀ with e = w − s (c − z).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.rounding.moments import damped

_ROUNDS = 2
_SWEEPS = 3
_BLOCK = 64  # columns


def output_error(layer: Layer, weight: Tensor, rounded: Tensor, curvature: Tensor) -> Tensor:
    """Σ e H eᵀ, mean square of what rounding adds to the outputs, shape (groups, outputs), float64.

    Args:
        layer: The layer.
        weight: What its outputs should be made with.
        rounded: What they are made with.
        curvature: H, shape (groups, columns, columns).
    """
    e = to_matrix(layer, rounded.double() - weight.double())
    return ((e @ curvature.double()) * e).sum(2)


def improve(
    layer: Layer, weight: Tensor, grid: Grid, codes: Tensor, curvature: Tensor, zeros: Tensor | None = None
) -> tuple[Grid, Tensor]:
    """Change single codes, then the scales, as long as that lowers the output error.

    A sweep visits the columns in order and gives each code the value that is best while all others are kept, which is
    exact: along one code the error is a parabola (coordinate descent, as in QuantEase, Behdin et al. 2023). The scale
    of each channel then follows in closed form, s = (w H u) / (u H u) with u = c − z.

    Args:
        layer: The layer.
        weight: What its outputs should be made with.
        grid: Its grid.
        codes: The codes to start from.
        curvature: E[z zᵀ], shape (groups, columns, columns).
        zeros: Which weights keep their code, that of zero.

    Returns:
        The grid with its new scales, and codes, uint8 in the shape of the weight.

    Example:
        >>> layer, w = Layer("fc", "linear", (1, 2)), torch.tensor([[0.4, 0.4]])
        >>> grid = Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
        >>> grid, codes = improve(layer, w, grid, torch.zeros(1, 2), torch.ones(1, 2, 2))
        >>> codes, round(float(grid.scale), 2)
        (tensor([[1, 0]], dtype=torch.uint8), 0.8)
    """
    h = damped(curvature).float()
    # Columns become rows: what the loop touches then lies together in memory.
    w, c, z = (
        to_matrix(layer, x.float().expand(layer.shape)).transpose(1, 2).contiguous()
        for x in (weight.detach(), codes, grid.zero_point)
    )
    fixed = None if zeros is None else to_matrix(layer, zeros).transpose(1, 2).contiguous()
    scale, top = grid.scale, to_matrix(layer, grid.top.expand(layer.shape))[:, :, 0]
    for _ in range(_ROUNDS):
        s = to_matrix(layer, scale.expand(layer.shape))[:, :, 0]
        for _ in range(_SWEEPS):
            if not _sweep(w, c, s, z, top, h, fixed):
                break
        scale = _fit_scale(layer, w, c - z, h, scale)
    return replace(grid, scale=scale), from_matrix(layer, c.transpose(1, 2)).to(torch.uint8).contiguous()


def _sweep(w: Tensor, c: Tensor, s: Tensor, z: Tensor, top: Tensor, h: Tensor, fixed: Tensor | None = None) -> bool:
    """Visit every column once and change ``c`` in place; whether anything changed.

    The slope of a column is needed when the column is visited: within a block it is brought up to date column by
    column, for all others once a block, by one product of matrices. Most columns stay as they are: those left of the
    block are looked at together, as far as the first that changes.

    Shapes: w, c, z and fixed (groups, columns, outputs), s and top (groups, outputs), h (groups, columns, columns).
    """
    slope = h @ (s[:, None] * (c - z) - w)  # half the gradient of the error
    inverse = 1 / (h.diagonal(dim1=1, dim2=2)[..., None] * s[:, None])
    changed, low, top = False, torch.zeros_like(top)[:, None], top[:, None]
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        near, block = slope[:, start:stop].contiguous(), h[:, start:stop, start:stop]
        moves, column = torch.zeros_like(near), 0
        while column < stop - start:
            here = slice(start + column, stop)
            best = (c[:, here] - near[:, column:] * inverse[:, here]).round_()
            steps = best.clamp_(low, top).sub_(c[:, here])
            if fixed is not None:
                steps.masked_fill_(fixed[:, here], 0.0)
            moving = steps.any(2).any(0).tolist()
            if not any(moving):
                break
            first = moving.index(True)
            column += first
            c[:, start + column] += steps[:, first]
            moves[:, column] = steps[:, first] * s
            near.baddbmm_(block[:, :, column, None], moves[:, column, None])
            column += 1
            changed = True
        slope.baddbmm_(h[:, :, start:stop], moves)
    return changed


def _fit_scale(layer: Layer, w: Tensor, u: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Least-squares scale of every channel; the old one where there is none above zero."""
    hu = h @ u
    along, square = (w * hu).sum(1), (u * hu).sum(1)
    if layer.transposed:  # a scale serves the same place in every group
        along, square = along.sum(0), square.sum(0)
    along, square = along.reshape(scale.shape), square.reshape(scale.shape)
    return torch.where((along > 0) & (square > 0), along / square.clamp_min(1e-30), scale)
