"""Activations: the grid that a layer's input is rounded to, one for the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_caq.errors import OptionError

# Parts of the range that are tried, 1 to 1/128. A few large activations among many small ones are common, so they are
# spaced evenly in their logarithm.
_FRACTIONS = [2 ** (-k / 8) for k in range(57)]
_REFINEMENTS = 4
_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class InputGrid:
    """The values scale · (code − zero_point) for code = 0, …, 2^bits − 1, the same for all inputs of a layer.

    Zero is one of them, so that the zeros of padding stay what they are. Plain numbers, so that a grid is the same in
    memory, in JSON, on every device and under every precision.

    Attributes:
        bits: Bit-width b_a, 1 to 8.
        scale: Step between neighbouring values, a float32 number.
        zero_point: Code that stands for 0; 0 where inputs are never negative, as after a ReLU.

    Raises:
        OptionError: If a number is out of its range.
    """

    bits: int
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.bits, self.zero_point))
        if not (whole and 1 <= self.bits <= 8 and 0 <= self.zero_point < 2**self.bits and 0 < self.scale < math.inf):
            raise OptionError(
                f"{self} is no grid: bits go from 1 to 8, the zero point from 0 to 2^bits - 1, the scale is above 0."
            )

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the largest code less the zero point: value = scale · code."""
        return -self.zero_point, 2**self.bits - 1 - self.zero_point

    def nearest(self, values: Tensor) -> Tensor:
        """Values rounded to the nearest of the grid, float32; those half-way between two go to the even code.

        Example:
            >>> InputGrid(2, 0.5, 1).nearest(torch.tensor([-9.0, -0.6, 0.1, 0.4, 9.0]))
            tensor([-0.5000, -0.5000,  0.0000,  0.5000,  1.0000])
        """
        return (values.float() / self.scale).round().clamp(*self.codes) * self.scale

    def round(self, values: Tensor) -> Tensor:
        """An input rounded in its own type; its gradient passes straight through (Bengio et al. 2013).

        What is no floating-point number, such as the tokens that an embedding takes, stays as it is.
        """
        if not values.is_floating_point():
            return values
        snapped = self.nearest(values.detach()).to(values.dtype)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return snapped
        return values + (snapped - values).detach()


def fit_input_grid(values: Tensor, bits: int) -> InputGrid:
    """The grid that rounds a layer's inputs with close to the least squared error.

    The ends of the range are moved towards zero one at a time, each to the best of many places, twice over. With the
    codes fixed, the scale then follows by regression and new codes from it (Lloyd's iteration), as long as that helps;
    so it does for the two neighbouring zero points where inputs have both signs, and the best of the three is taken.

    Args:
        values: A sample of the inputs, with the smallest and the largest of all among them.
        bits: Bit-width b_a, 1 to 8.

    Returns:
        The grid. Inputs that are all zero get a grid with a scale of 1.

    Example:
        >>> fit_input_grid(torch.tensor([0.0, 1.0, 2.0, 3.0]), bits=2)
        InputGrid(bits=2, scale=1.0, zero_point=0)
    """
    values = values.detach().float().flatten()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if low == high:
        return InputGrid(bits, 1.0, 0)

    lower, upper = low, high
    for _ in range(2 if low < 0 < high else 1):
        if high > 0:
            upper = min((f * high for f in _FRACTIONS), key=lambda end: _error(values, _spanning(lower, end, bits)))
        if low < 0:
            lower = min((f * low for f in _FRACTIONS), key=lambda end: _error(values, _spanning(end, upper, bits)))
    best, top = _spanning(lower, upper, bits), 2**bits - 1
    zeros = [best.zero_point]
    if low < 0 < high:
        zeros += [zero for zero in (zeros[0] - 1, zeros[0] + 1) if 0 <= zero <= top]
    grids = [_refined(values, replace(best, zero_point=zero)) for zero in zeros]
    return min(grids, key=lambda grid: _error(values, grid))


def change_first(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with the first of them, by place or by keyword, changed.

    Example:
        >>> change_first(abs, (), {"input": -1, "other": -2})
        ((), {'input': 1, 'other': -2})
    """
    if args:
        return (change(args[0]), *args[1:]), dict(kwargs)
    name = next(iter(kwargs))
    return args, {**kwargs, name: change(kwargs[name])}


def _error(values: Tensor, grid: InputGrid) -> float:
    """Mean squared error of rounding."""
    return float((grid.nearest(values) - values).square().mean(dtype=torch.float64))


def _refined(values: Tensor, grid: InputGrid) -> InputGrid:
    """The grid with a scale that suits its codes better."""
    for _ in range(_REFINEMENTS):
        codes = (values / grid.scale).round().clamp(*grid.codes)
        if not codes.any():
            break
        slope = float((codes * values).mean(dtype=torch.float64) / codes.square().mean(dtype=torch.float64))
        grid = min(grid, replace(grid, scale=_stored(slope)), key=lambda candidate: _error(values, candidate))
    return grid


def _spanning(low: float, high: float, bits: int) -> InputGrid:
    """The grid from about ``low`` to ``high``, zero between them."""
    top = 2**bits - 1
    scale = _stored((high - low) / top)
    return InputGrid(bits, scale, min(round(-low / scale), top))


def _stored(scale: float) -> float:
    """The float32 number that is stored."""
    return float(torch.tensor(max(scale, _SMALLEST_SCALE), dtype=torch.float32))
