"""Least squares: the scale and zero point with which an affine grid rounds the weights of a channel best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.ranges import smallest_scale, to_halves

# Ranges that are tried, as fractions of the full range, and shifts of their middle, in steps. Clipping pays at 2 and 3
# bits, hardly above, and more the heavier the tails; at a given step the two or three nearest zero points differ more
# than neighbouring fractions do.
_FRACTIONS = [0.1, 0.15, 0.2, 0.25, *torch.linspace(0.3, 1.05, 16).tolist()]
_SHIFTS = (-0.5, 0.0, 0.5)
_REFINEMENTS = 8
# Of a channel with more weights the error depends smoothly on the range. A few ranges then show where the best lies.
_FEW_WEIGHTS = 1024
_NEAR = (0.9, 0.95, 1.0, 1.05, 1.1)
_BLOCK_NUMBERS = 2**16  # weights that are looked at together, 256 KiB: they stay in the processor's cache
_TINY = 1e-30

Pair = tuple[Tensor, Tensor]
"""Scale and zero point of each channel, shape (channels, 1)."""


def in_type(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales in the type that they are stored in, none of them zero.

    Example:
        >>> in_type(torch.tensor([0.1, 0.0]), torch.float16)
        tensor([9.9976e-02, 5.9605e-08], dtype=torch.float16)
    """
    stored = scale.float().to(scale_dtype)
    info = torch.finfo(scale_dtype)
    return torch.where(stored > 0, stored, info.tiny * info.eps).clamp(max=info.max)


def search_grid(
    rows: Tensor,
    top: Tensor,
    full: Pair,
    zero_is_fixed: bool,
    importance: Tensor | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> Pair:
    """A grid of close to the least (weighted) squared error, channel by channel.

    Computed in float32, by blocks of channels: some 60 passes over the weights, or 30 where channels are long.

    Args:
        rows: Weights, shape (channels, weights).
        top: The largest code of each channel, 2^b − 1, shape (channels, 1) or (1, 1).
        full: Scale and zero point of the grid on the full range.
        zero_is_fixed: Whether the zero point has to stay.
        importance: How much the squared error of each weight counts, shape (channels, weights).
        scale_dtype: Type that scales are stored in.

    Returns:
        Scale, a number of that type, and zero point, a multiple of one half. The error never exceeds that of ``full``.

    Example:
        >>> rows, top = torch.tensor([[-9.0, -1.0, 0.0, 1.0, 2.0, 9.0]]), torch.tensor([[3.0]])
        >>> scale, zero = search_grid(rows, top, (torch.tensor([[6.0]]), torch.tensor([[1.5]])), zero_is_fixed=False)
        >>> round(float(scale), 2), float(zero)
        (5.27, 1.5)
    """
    size = max(_BLOCK_NUMBERS // rows.shape[1], 1)
    whole = (rows, top.expand(len(rows), 1), *full, *(() if importance is None else (importance,)))
    blocks = zip(*(x.split(size) for x in whole), strict=True)
    pairs = [
        _search_block(*(x.float() for x in block), zero_is_fixed=zero_is_fixed, scale_dtype=scale_dtype)
        for block in blocks
    ]
    scale, zero = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return scale, zero


def _search_block(
    rows: Tensor,
    top: Tensor,
    scale: Tensor,
    zero: Tensor,
    importance: Tensor | None = None,
    *,
    zero_is_fixed: bool,
    scale_dtype: torch.dtype,
) -> Pair:
    full = scale, zero
    if rows.shape[1] <= _FEW_WEIGHTS:
        starts = [full, *narrower_grids(rows, top, full, zero_is_fixed)]
    else:
        coarse = narrower_grids(rows, top, full, zero_is_fixed, fractions=_FRACTIONS[1::2], shifts=(0.0,))
        best = least_squares_grid(
            rows, top, [full, *coarse], zero_is_fixed, importance, refinements=0, scale_dtype=scale_dtype
        )
        starts = [best, *nearby_grids(rows, top, best, zero_is_fixed)]
    return least_squares_grid(rows, top, starts, zero_is_fixed, importance, scale_dtype=scale_dtype)


def narrower_grids(
    rows: Tensor,
    top: Tensor,
    full: Pair,
    zero_is_fixed: bool,
    *,
    fractions: Sequence[float] = _FRACTIONS,
    shifts: Sequence[float] = _SHIFTS,
) -> Iterator[Pair]:
    """Grids on parts of the full range, shrunk towards the channel's mean and shifted.

    Args:
        rows: Weights, shape (channels, weights).
        top: The largest code of each channel, 2^b − 1, shape (channels, 1) or (1, 1).
        full: Scale and zero point of the grid on the full range.
        zero_is_fixed: Whether the zero point has to stay.
        fractions: Parts of the full range.
        shifts: What is added to zero points, in steps.

    Yields:
        Scale and zero point; those of a channel that holds one value only stay as they are.
    """
    low, high, mean = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), rows.mean(1, keepdim=True)
    constant, least = high <= low, smallest_scale(low, high)
    step, zero = full
    for fraction in fractions:
        scale = torch.where(constant, step, torch.maximum(step * fraction, least))
        if zero_is_fixed:
            yield scale, zero
            continue
        # Outliers on one side move the middle of the range away from where most weights lie; cut off, they should not.
        centre = mean + min(fraction, 1.0) * ((low + high) / 2 - mean)
        for shift in shifts:
            yield scale, torch.where(constant, zero, to_halves(top / 2 - centre / scale + shift))


def nearby_grids(rows: Tensor, top: Tensor, pair: Pair, zero_is_fixed: bool) -> Iterator[Pair]:
    """Grids of a little more or less range than a given one, with the same middle, and shifted ones.

    Args:
        rows: Weights, shape (channels, weights).
        top: The largest code of each channel, 2^b − 1, shape (channels, 1).
        pair: Scale and zero point of the given grid.
        zero_is_fixed: Whether the zero point has to stay.

    Yields:
        Scale and zero point; those of a channel that holds one value only stay as they are.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    constant, least = high <= low, smallest_scale(low, high)
    scale, zero = pair
    centre = (top / 2 - zero) * scale
    for factor in _NEAR:
        nearby = torch.where(constant, scale, torch.maximum(scale * factor, least))
        for shift in (0.0,) if zero_is_fixed else _SHIFTS:
            moved = zero if zero_is_fixed else to_halves(top / 2 - centre / nearby + shift)
            yield nearby, torch.where(constant, zero, moved)


def least_squares_grid(
    rows: Tensor,
    top: Tensor,
    starts: Iterable[Pair],
    zero_is_fixed: bool,
    importance: Tensor | None = None,
    *,
    refinements: int = _REFINEMENTS,
    scale_dtype: torch.dtype = torch.float32,
) -> Pair:
    """The best of some grids by (weighted) squared error, refined.

    With the codes kept, scale and zero point follow from a linear regression of the weights on the codes, and new codes
    from these (Lloyd's iteration on an evenly spaced grid). The error never exceeds that of the best start.

    Args:
        rows: Weights, shape (channels, weights).
        top: The largest code of each channel, 2^b − 1, shape (channels, 1) or (1, 1).
        starts: Scales and zero points to begin with, at least one.
        zero_is_fixed: Whether the zero points of the starts have to stay.
        importance: How much the squared error of each weight counts, shape (channels, weights).
        refinements: Most steps of the iteration.
        scale_dtype: Type that scales are stored in.

    Returns:
        Scale, a number of that type, and zero point, a multiple of one half.

    Example:
        >>> rows, top = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double(), torch.tensor([[3.0]]).double()
        >>> start = torch.tensor([[0.9]]).double(), torch.tensor([[0.0]]).double()
        >>> [x.item() for x in least_squares_grid(rows, top, [start], zero_is_fixed=True)]
        [1.0, 0.0]
    """
    zeros = torch.zeros_like(top)

    def total(values: Tensor) -> Tensor:
        return (values if importance is None else importance * values).sum(1, keepdim=True)

    def codes(scale: Tensor, zero: Tensor) -> Tensor:
        return (rows / scale + zero).round_().clamp_(zeros, top)

    count = total(torch.ones_like(rows)) if importance is not None else rows.shape[1]

    def regress(q: Tensor, scale: Tensor, zero: Tensor) -> Pair:
        """Least-squares scale and zero point for some codes; the old ones where the codes do not differ."""
        if not zero_is_fixed:
            q_mean, w_mean = total(q) / count, total(rows) / count
            spread, along = total((q - q_mean).square()), total((q - q_mean) * (rows - w_mean))
            slope = along / spread.clamp_min(_TINY)
            usable = (spread > 0) & (slope > 0)
            scale = torch.where(usable, slope, scale)
            zero = to_halves(torch.where(usable, q_mean - w_mean / scale, zero))
        spread, along = total((q - zero).square()), total((q - zero) * rows)
        slope = along / spread.clamp_min(_TINY)
        return torch.where((spread > 0) & (slope > 0), slope, scale), zero

    best_scale, best_zero, least = rows[:, :1], rows[:, :1], rows.new_full((len(rows), 1), torch.inf)

    def offer(scale: Tensor, zero: Tensor) -> Tensor:
        """Take a scale and a zero point where they round better, judged by the number that is stored; tells where."""
        nonlocal best_scale, best_zero, least
        scale = (scale.float() if scale_dtype == torch.float32 else in_type(scale, scale_dtype)).to(rows)
        # Σ (s (c − z) − w)² as s² Σ (c − (w / s + z))², which takes fewer passes over the weights.
        places = torch.addcdiv(zero.to(rows), rows, scale)
        gaps = places.round().clamp_(zeros, top).sub_(places)
        error = total(gaps.square_()) * scale.square()
        better = error < least
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        least = torch.where(better, error, least)
        return better

    for scale, zero in starts:
        offer(scale, zero)
    for _ in range(refinements):
        if not bool(offer(*regress(codes(best_scale, best_zero), best_scale, best_zero)).any()):
            break
    return best_scale, best_zero


_RANGES = (1.0, 0.85, 0.7, 0.55, 0.4)  # fractions of the range that holds every weight


def whole_zero_grid(rows: Tensor, top: Tensor, pair: Pair, *, scale_dtype: torch.dtype = torch.float32) -> Pair:
    """The grid on whose values zero lies that rounds best, near one that was fitted: its zero point is a code.

    Args:
        rows: Weights, shape (channels, weights).
        top: The largest code of each channel, 2^b − 1, shape (channels, 1) or (1, 1).
        pair: Scale and zero point of the grid that was fitted.
        scale_dtype: Type that scales are stored in.

    Example:
        >>> rows, top = torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([[3.0]]).double()
        >>> fitted = torch.tensor([[1.0]]).double(), torch.tensor([[-0.5]]).double()
        >>> [x.item() for x in whole_zero_grid(rows, top, fitted)]
        [1.0, 0.0]
    """
    scale, zero = pair
    above, below = rows.amax(1, keepdim=True).clamp_min(0), (-rows.amin(1, keepdim=True)).clamp_min(0)
    starts = []
    for whole in (zero.floor().clamp_min(0).minimum(top), zero.ceil().clamp_min(0).minimum(top)):
        full = torch.maximum(above / (top - whole).clamp_min(0.5), below / whole.clamp_min(0.5))
        full = torch.where(full > 0, full, scale)
        starts += [(scale, whole), *((full * fraction, whole) for fraction in _RANGES)]
    return least_squares_grid(rows, top, starts, zero_is_fixed=True, scale_dtype=scale_dtype)
