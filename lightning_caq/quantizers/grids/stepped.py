"""Stepped grids: all multiples of one step, without bounds, for codes that are entropy-coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class SteppedGrid:
    """The values step · code for every whole number; the counterpart of ``Grid`` where codes have no width.

    Attributes:
        step: Distance of neighbouring values, float32, in a shape that broadcasts to the weight.
        bits: Bits that a code takes on average once coded.
        transposed: Groups of a transposed convolution, whose weight holds input channels first; 0 for other layers.
    """

    quantizer: ClassVar[str] = "stepped"
    step: Tensor
    bits: float = 0.0
    transposed: int = 0

    @property
    def width(self) -> float:
        """The bits a code."""
        return self.bits

    def tolerance(self, shape: Sequence[int]) -> Tensor:
        """How far a stored weight may be from its value for rounding's sake, in a shape that broadcasts to its own."""
        return 1e-3 * self.step

    def to(self, device: torch.device | str) -> SteppedGrid:
        """The grid on another device."""
        return replace(self, step=self.step.to(device))

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values, float32 whole numbers in the shape of ``weight``."""
        return (weight.float() / self.step).round()

    def values(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, float32."""
        return self.step * codes.float()

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight rounded to the nearest values, float32.

        Example:
            >>> import torch
            >>> SteppedGrid(torch.tensor([[0.5]])).nearest(torch.tensor([[-0.6, 0.1, 90.3]]))
            tensor([[-0.5000,  0.0000, 90.5000]])
        """
        return self.values(self.codes(weight))
