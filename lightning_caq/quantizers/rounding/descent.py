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
from lightning_caq.quantizers.grids.least_squares import in_type
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
    of each channel then follows in closed form, s = (w H u) / (u H u) with u = c − z; those of groups one after the
    other, w then being what the other groups leave.

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
        for x in (weight.detach(), codes, grid.per_weight(layer.shape)[1])
    )
    fixed = None if zeros is None else to_matrix(layer, zeros).transpose(1, 2).contiguous()
    top = to_matrix(layer, grid.top.expand(layer.shape))[:, :, 0]
    for _ in range(_ROUNDS):
        s = to_matrix(layer, grid.per_weight(layer.shape)[0].expand(layer.shape)).transpose(1, 2)
        for _ in range(_SWEEPS):
            if not _sweep(w, c, s, z, top, h, fixed):
                break
        grid = replace(grid, scale=_fit_scales(layer, w, c - z, h, s, grid))
    return grid, from_matrix(layer, c.transpose(1, 2)).to(torch.uint8).contiguous()


def _sweep(w: Tensor, c: Tensor, s: Tensor, z: Tensor, top: Tensor, h: Tensor, fixed: Tensor | None = None) -> bool:
    """Visit every column once and change ``c`` in place; whether anything changed.

    The slope of a column is needed when the column is visited: within a block it is brought up to date column by
    column, for all others once a block, by one product of matrices. Most columns stay as they are: those left of the
    block are looked at together, as far as the first that changes.

    Shapes: w, c, s, z and fixed (groups, columns, outputs), top (groups, outputs), h (groups, columns, columns).
    """
    slope = h @ (s * (c - z) - w)  # half the gradient of the error
    inverse = 1 / (h.diagonal(dim1=1, dim2=2)[..., None] * s)
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
            moves[:, column] = steps[:, first] * s[:, start + column]
            near.baddbmm_(block[:, :, column, None], moves[:, column, None])
            column += 1
            changed = True
        slope.baddbmm_(h[:, :, start:stop], moves)
    return changed


def _fit_scales(layer: Layer, w: Tensor, u: Tensor, h: Tensor, s: Tensor, grid: Grid) -> Tensor:
    """Least-squares scales of every channel, group after group; the old one where there is none above zero.

    The error is a parabola along a scale, so that the number of its type next to the best one is the best of them.

    Args:
        layer: The layer.
        w: The weight, shape (groups, columns, outputs).
        u: c − z, same shape.
        h: Shape (groups, columns, columns).
        s: The scales of each weight, in the shape of ``w``.
        grid: The grid with the scales as they are.
    """
    size = grid.group_size or w.shape[1]
    rest = w - s * u
    scales = []
    for start in range(0, w.shape[1], size):
        here = slice(start, start + size)
        rest[:, here] = w[:, here]
        hu = h[:, :, here] @ u[:, here]
        along, square = (rest * hu).sum(1), (u[:, here] * hu[:, here]).sum(1)
        if layer.transposed:  # a scale serves the same place in every group
            along, square = along.sum(0, keepdim=True), square.sum(0, keepdim=True)
        best = torch.where((along > 0) & (square > 0), along / square.clamp_min(1e-30), s[: len(along), start])
        scales.append(in_type(best, grid.scale.dtype))
        rest[:, here] -= scales[-1].float()[:, None] * u[:, here]
    return torch.stack(scales, -1).reshape(grid.scale.shape)
