"""Learned steps: rounding whose step or clip has a gradient, for fine-tuning.

What is learned is a factor on the step that calibration found, 1 at the start: one learning rate then suits small and
large steps alike.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.least_squares import in_type

_LEAST = 1e-3  # factors stay above this


def stretched(grid: Grid, factor: Tensor) -> Grid:
    """The grid with its scales multiplied by a learned factor.

    Args:
        grid: The grid as it was calibrated.
        factor: One a channel, in the shape of its scales.
    """
    return replace(grid, scale=in_type(grid.scale.float() * factor.clamp_min(_LEAST), grid.scale.dtype))


def lsq_round(weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
    """Q(w) = s (round(clip(w / s + z)) − z) with gradients for w and for the factor on s (LSQ, Esser et al. 2020).

    Rounding passes gradients straight through and clipping stops them, so ∂Q/∂s is code − z − w/s inside the range and
    code − z outside. The factor's gradient is divided by √(n (2^b − 1)), n weights a channel, as the paper does to keep
    its steps in proportion to those of the weights.

    Args:
        weight: The weight.
        grid: The grid as it was calibrated.
        factor: One a channel, in the shape of its scales.

    Returns:
        The rounded weight, in its own type; the values are those of ``stretched(grid, factor).nearest(weight)``.

    Example:
        >>> import torch
        >>> grid = Grid(2, torch.tensor([[1.0]]), torch.tensor([[0.0]]))
        >>> factor = torch.ones(1, 1, requires_grad=True)
        >>> lsq_round(torch.tensor([[9.0]]), grid, factor).sum().backward()
        >>> round(float(factor.grad) * 3**0.5, 4)  # the largest code is 3
        3.0
    """
    share = (weight.numel() / factor.numel() * grid.top).rsqrt()
    slow = factor.detach() + (factor - factor.detach()) * share
    learned = grid.scale.float() * slow.clamp_min(_LEAST)
    stored = stretched(grid, factor.detach()).scale.float()
    grid = replace(grid, scale=stored + (learned - learned.detach()))
    scale, zero_point = grid.per_weight(weight.shape)
    place = (weight.float() / scale + zero_point).clamp(min=0).minimum(grid.top)
    code = place.detach().round() + (place - place.detach())
    return grid.values(code).to(weight.dtype)


def pact_round(values: Tensor, grid: InputGrid, factor: Tensor) -> Tensor:
    """An input clipped to [0, α] and rounded to 2^b − 1 even steps (PACT, Choi et al. 2018).

    Values above the clip α pass their gradient to α, those inside to themselves, those below 0 to nothing.

    Args:
        values: The input of a layer; never negative as a rule, as after a ReLU.
        grid: The grid as it was calibrated, with zero point 0.
        factor: A factor on its clip, without dimensions.

    Returns:
        The rounded input, in its own type.

    Example:
        >>> import torch
        >>> factor = torch.ones((), requires_grad=True)
        >>> pact_round(torch.tensor([0.4, 5.0, 7.0]), InputGrid(2, 1.0, 0), factor).sum().backward()
        >>> factor.grad  # two values are cut off at 3
        tensor(6.)
    """
    clip = grid.scale * (2**grid.bits - 1) * factor.clamp_min(_LEAST)
    kept = values.float().clamp(min=0).minimum(clip)
    step = (clip / (2**grid.bits - 1)).detach()
    rounded = (kept.detach() / step).round() * step
    passed: Tensor = rounded + (kept - kept.detach())
    return passed.to(values.dtype)
