"""The state of a fake-quant module: the grids of its weight and of its input, and what is learned of them.

It is one object under one private name, so that attributes of the class that is replaced, whatever they are called,
stay what they are. It is in no state dict: the keys of a network are those it had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.quantizers.fake_quant.learned import lsq_round, pact_round, stretched
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.values import Values, numbers

PREFIX = "_lightning_caq_"  # of every attribute that a module is given
STATE = f"{PREFIX}fake_quant"
LEARNED = ("scale_factor", "clip_factor")  # Parameters while scales are learned


@dataclass(eq=False)
class FakeQuantState:
    """How a module rounds its weight and its input.

    Attributes:
        calibrated: The values that the weight may take, as they were calibrated.
        input_grid: Grid of the input, or ``None`` where inputs stay as they are.
        quantizing: Whether the forward pass rounds at all. Turned off, with a warning, when a state dict brings weights
            that are not on the grid: they run as the float weights they are.
        scale_factor: What the scale is multiplied by while it is learned, else ``None``.
        clip_factor: The same for the clip of the input.
    """

    calibrated: Values
    input_grid: InputGrid | None = None
    quantizing: bool = True
    scale_factor: nn.Parameter | None = None
    clip_factor: nn.Parameter | None = None

    @property
    def bits(self) -> int | float:
        """Bit-width; the largest one where channels differ, the average where codes are entropy-coded."""
        return self.calibrated.bits

    @property
    def grid(self) -> Values:
        """The values that the weight may take, with the scales that were learned."""
        if self.scale_factor is None or not isinstance(self.calibrated, Grid):
            return self.calibrated
        return stretched(self.calibrated, self.scale_factor.detach())

    @property
    def learned_input_grid(self) -> InputGrid | None:
        """The grid of the input with the clip that was learned."""
        if self.clip_factor is None or self.input_grid is None:
            return self.input_grid
        factor = float(self.clip_factor.detach().float().clamp_min(1e-3))
        return replace(self.input_grid, scale=factor * self.input_grid.scale)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The weight on the grid, in its own dtype; its gradient passes straight through (Bengio et al. 2013).

        Example:
            >>> grid = Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
            >>> FakeQuantState(grid).rounded_weight(torch.tensor([[0.4, 1.7]]))
            tensor([[0., 2.]])
        """
        if not self.quantizing:
            return weight
        self._follow(weight.device)
        if self.scale_factor is not None and torch.is_grad_enabled():
            assert isinstance(self.calibrated, Grid)
            return lsq_round(weight, self.calibrated, self.scale_factor)
        snapped = self.grid.nearest(weight.detach()).to(weight.dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return snapped
        return weight + (snapped - weight).detach()

    def rounded_input(self, input: Tensor) -> Tensor:
        """The input on its grid, if it has one, in its own dtype; its gradient passes straight through."""
        if self.input_grid is None or not self.quantizing:
            return input
        if self.clip_factor is not None and torch.is_grad_enabled():
            return pact_round(input, self.input_grid, self.clip_factor)
        grid = self.learned_input_grid
        assert grid is not None
        return grid.round(input)

    def _follow(self, device: torch.device) -> None:
        """Move the grid to where the module was moved."""
        grid = self.calibrated
        if next(iter(numbers(grid).values())).device != device:
            self.calibrated = grid.to(device)


def rounding_state(module: Any) -> FakeQuantState:
    """The state of a fake-quant module."""
    state: FakeQuantState = getattr(module, STATE)
    return state
