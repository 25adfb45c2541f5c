"""Ranges: where an affine grid begins and ends, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.aciq import clipping
from lightning_caq.quantizers.grids.affine import Grid, fit_grid
from lightning_caq.sizes import Width

RANGES = ("mse", "minmax", "percentile", "aciq", "curvature")
SYMMETRIES = ("asymmetric", "symmetric", "mid_rise")
_PERCENTILE = 0.999
_FRACTIONS = torch.linspace(0.2, 1.05, 18).tolist()
_REFINEMENTS = 8
_LARGEST_ZERO_POINT = 16_000.0


def fit_range(
    weight: Tensor,
    bits: Width,
    channel_shape: tuple[int, ...],
    range: str = "mse",
    symmetry: str = "asymmetric",
    importance: Tensor | None = None,
) -> Grid:
    """An affine grid whose range is chosen by one of the field's rules.

    ``"mse"`` looks for the least squared error; ``"minmax"`` holds every weight; ``"percentile"`` leaves out a
    thousandth of the weights at either end (Wu et al. 2020); ``"aciq"`` takes the optimum for a Laplace or a Gauss
    distribution (Banner et al. 2019); ``"curvature"`` looks for the least squared error weighted by ``importance``.

    Args:
        weight: The weight, any floating-point type.
        bits: Bit-width b, 1 to 8, or one a channel.
        channel_shape: Shape of one scale per channel, broadcastable to the weight.
        range: A name of ``RANGES``.
        symmetry: ``"asymmetric"`` lets the zero point lie where it is best; ``"symmetric"`` fixes it at the code
            2^(b−1), so that zero is a value; ``"mid_rise"`` between the two middle codes, so that values come in pairs.
        importance: How much the squared error of each weight counts, same shape as the weight, for ``"curvature"``;
            without it all count the same.

    Returns:
        The grid.

    Example:
        >>> w = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
        >>> grid = fit_range(w, 2, (1, 1), range="minmax")
        >>> grid.scale, grid.zero_point
        (tensor([[1.]]), tensor([[1.]]))
        >>> fit_range(w, 2, (1, 1), range="minmax", symmetry="mid_rise").values(torch.arange(4)[None])
        tensor([[-2.0000, -0.6667,  0.6667,  2.0000]])
    """
    if range == "mse" and symmetry == "asymmetric":
        return fit_grid(weight, bits, channel_shape)
    if not isinstance(bits, int):
        grids = {b: fit_range(weight, b, channel_shape, range, symmetry, importance) for b in sorted(set(bits))}
        return _each_its_own(bits, grids)
    rows = _rows(weight, channel_shape)
    top = 2**bits - 1
    zero = {"asymmetric": None, "symmetric": 2.0 ** (bits - 1), "mid_rise": top / 2}[symmetry]
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if range == "percentile":
        low, high = (_quantile(rows, part) for part in (1 - _PERCENTILE, _PERCENTILE))
    elif range == "aciq":
        low, high = clipping(rows, bits, centred=zero is not None)
    pair = _between(low, high, top, zero)
    if range in ("mse", "curvature"):
        weights = torch.ones_like(rows) if range == "mse" or importance is None else _rows(importance, channel_shape)
        starts = [_between(f * low, f * high, top, zero) for f in _FRACTIONS]
        if zero is None:
            grid = fit_grid(weight, bits, channel_shape)
            starts.append((grid.scale.double().reshape(-1, 1), grid.zero_point.double().reshape(-1, 1)))
        pair = _least_error(rows, weights, starts, top, fixed=zero is not None)
    scale, zero_point = (x.float().reshape(channel_shape) for x in pair)
    return Grid(bits, scale, zero_point)


def _each_its_own(bits: tuple[int, ...], grids: Mapping[int, Grid]) -> Grid:
    """One grid of several: each channel takes its scale and zero point from the grid of its bit-width."""
    first = grids[bits[0]]
    channel_bits = torch.tensor(bits, dtype=torch.uint8, device=first.scale.device).reshape(first.scale.shape)
    scale, zero = first.scale, first.zero_point
    for b, grid in grids.items():
        scale = torch.where(channel_bits == b, grid.scale, scale)
        zero = torch.where(channel_bits == b, grid.zero_point, zero)
    return Grid(max(bits), scale, zero, channel_bits)


def _quantile(rows: Tensor, part: float) -> Tensor:
    """Quantile of each row, between two weights by interpolation; ``Tensor.quantile`` takes no large rows."""
    ascending, place = rows.sort(1).values, part * (rows.shape[1] - 1)
    below = int(place)
    above = min(below + 1, rows.shape[1] - 1)
    return ascending[:, below, None].lerp(ascending[:, above, None], place - below)


def _between(low: Tensor, high: Tensor, top: int, zero: float | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the narrowest grid that reaches from ``low`` to ``high``."""
    if zero is not None:
        needed = torch.maximum(high / (top - zero) if top > zero else high * 0, -low / zero)
        # With one bit a symmetric grid has no value above zero.
        scale = torch.where(needed > 0, needed, torch.maximum(high.abs(), low.abs())).clamp_min(1e-30)
        return scale, torch.full_like(scale, zero)
    largest = torch.maximum(low.abs(), high.abs())
    constant = high <= low
    # A constant channel c is code 1 of the values 0, |c|, …, or their negatives, as in ``fit_grid``.
    scale = torch.maximum((high - low) / top, largest / _LARGEST_ZERO_POINT)
    scale = torch.where(constant, largest.clamp_min(1e-30), scale)
    middle = top / 2 - (low + high) / 2 / scale
    return scale, _halves(torch.where(constant, torch.where(low < 0, float(top), 0.0), middle))


def _least_error(
    rows: Tensor, weights: Tensor, starts: Iterable[tuple[Tensor, Tensor]], top: int, fixed: bool
) -> tuple[Tensor, Tensor]:
    """The best start by weighted squared error, improved by Lloyd's iteration: codes, then a regression on them."""

    def codes(scale: Tensor, zero: Tensor) -> Tensor:
        return (rows / scale + zero).round().clamp(0, top)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return (weights * (scale * (codes(scale, zero) - zero) - rows).square()).sum(1, keepdim=True)

    (scale, zero), *others = starts
    least = error(scale, zero)

    def offer(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal scale, zero, least
        new_scale = new_scale.float().double()  # judge the number that will be stored
        found = error(new_scale, new_zero)
        scale, zero = torch.where(found < least, new_scale, scale), torch.where(found < least, new_zero, zero)
        least = torch.minimum(found, least)

    for pair in others:
        offer(*pair)
    for _ in range(_REFINEMENTS):
        q = codes(scale, zero)
        if not fixed:
            offer(scale, _regressed_zero(rows, weights, q, scale, zero))
            q = codes(scale, zero)
        u = q - zero
        along, square = (weights * u * rows).sum(1, keepdim=True), (weights * u * u).sum(1, keepdim=True)
        offer(torch.where((along > 0) & (square > 0), along / square.clamp_min(1e-30), scale), zero)
    return scale, zero


def _regressed_zero(rows: Tensor, weights: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The zero point of the weighted regression of the weights on their codes, at the slope that is best for them."""
    total = weights.sum(1, keepdim=True).clamp_min(1e-30)
    q_mean, w_mean = (weights * codes).sum(1, keepdim=True) / total, (weights * rows).sum(1, keepdim=True) / total
    q, w = codes - q_mean, rows - w_mean
    spread, along = (weights * q * q).sum(1, keepdim=True), (weights * q * w).sum(1, keepdim=True)
    slope = torch.where((spread > 0) & (along > 0), along / spread.clamp_min(1e-30), scale)
    return torch.where((spread > 0) & (along > 0), _halves(q_mean - w_mean / slope), zero)


def _halves(zero: Tensor) -> Tensor:
    return ((2 * zero).round() / 2).clamp(-_LARGEST_ZERO_POINT, _LARGEST_ZERO_POINT)


def _rows(values: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
    """Values with one row a channel, float64."""
    axis = next((d for d, size in enumerate(channel_shape) if size > 1), 0)
    return values.detach().double().movedim(axis, 0).reshape(channel_shape[axis], -1)
