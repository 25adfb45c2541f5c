"""Packed weights of codebooks: codes at their bit-width, and the few numbers that their table is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.packing.codes import pack_codes, unpack_codes


@dataclass(frozen=True)
class PackedTable:
    """A weight whose values are those of a codebook, in the bytes that are counted; the counterpart of PackedWeight.

    Attributes:
        quantizer: The quantizer that the table is of.
        bits: Bit-width.
        shape: Shape of the weight.
        codes: Packed codes, uint8, ⌈n · bits / 8⌉ bytes.
        basis: Numbers that the table is made of, float32, shape (*channel shape, numbers).
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "basis")
    quantizer: str
    bits: int
    shape: tuple[int, ...]
    codes: Tensor
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, codebook: Codebook) -> PackedTable:
        """A weight, packed.

        Args:
            weight: The weight; it is rounded to the nearest values.
            codebook: The values.

        Example:
            >>> codebook = Codebook.of("codebook", 1, torch.tensor([[-0.5, 2.0]]))
            >>> packed = PackedTable.of(torch.tensor([[2.0, -0.5, 2.0]]), codebook)
            >>> packed.codes, packed.values()
            (tensor([5], dtype=torch.uint8), tensor([[ 2.0000, -0.5000,  2.0000]]))
        """
        codes = pack_codes(codebook.codes(weight.detach()), codebook)
        return cls(codebook.quantizer, codebook.bits, tuple(weight.shape), codes, codebook.basis)

    @property
    def grid(self) -> Codebook:
        """The values."""
        return Codebook.of(self.quantizer, self.bits, self.basis)

    def values(self) -> Tensor:
        """The weight, float32."""
        values = self.grid
        return values.values(unpack_codes(self.codes, values, self.shape))

    def to(self, device: torch.device) -> PackedTable:
        """The same on another device."""
        return PackedTable(self.quantizer, self.bits, self.shape, self.codes.to(device), self.basis.to(device))
