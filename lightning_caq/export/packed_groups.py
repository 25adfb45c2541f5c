"""Packed weights with a scale a group: codes at their bit-width, zero points at one bit more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.packing.codes import pack_codes, unpack_codes
from lightning_caq.quantizers.packing.zero_points import pack_zero_points, unpack_zero_points


@dataclass(frozen=True)
class PackedGroups:
    """A weight whose groups have scales of their own, in the bytes that are counted; the counterpart of PackedWeight.

    Attributes:
        bits: Bit-width.
        shape: Shape of the weight.
        group_size: Weights of a group.
        codes: Packed codes, uint8, ⌈n · bits / 8⌉ bytes.
        scale: Steps of the grid, in the type that they are stored in, shape (*channel shape, groups).
        zero_points: Packed zero points, uint8, bits + 1 bits a group.
    """

    quantizer: ClassVar[str] = "affine"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero_points")
    bits: int
    shape: tuple[int, ...]
    group_size: int
    codes: Tensor
    scale: Tensor
    zero_points: Tensor

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> PackedGroups:
        """A weight, packed.

        Args:
            weight: The weight; it is rounded to the grid.
            grid: The grid.

        Example:
            >>> grid = Grid(2, torch.tensor([[[0.5, 1.0]]]), torch.tensor([[[1.5, 0.0]]]), group_size=2)
            >>> packed = PackedGroups.of(torch.tensor([[-0.75, 0.25, 3.0]]), grid)
            >>> packed.zero_points, packed.values()
            (tensor([3], dtype=torch.uint8), tensor([[-0.7500,  0.2500,  3.0000]]))
        """
        assert grid.group_size is not None
        return cls(
            bits=grid.bits,
            shape=tuple(weight.shape),
            group_size=grid.group_size,
            codes=pack_codes(grid.codes(weight.detach()), grid),
            scale=grid.scale,
            zero_points=pack_zero_points(grid.zero_point, grid.bits),
        )

    @property
    def grid(self) -> Grid:
        """The grid."""
        zero_point = unpack_zero_points(self.zero_points, self.bits, tuple(self.scale.shape))
        return Grid(self.bits, self.scale, zero_point, group_size=self.group_size)

    def values(self) -> Tensor:
        """The weight, float32."""
        grid = self.grid
        return grid.values(unpack_codes(self.codes, grid, self.shape))

    def to(self, device: torch.device) -> PackedGroups:
        """The same on another device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in self.parts})
