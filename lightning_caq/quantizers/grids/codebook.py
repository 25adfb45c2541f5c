"""Codebooks: values in a table, evenly spaced or not, one table a layer or one a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.levels import levels
from lightning_caq.sizes import FLOAT_BITS


@dataclass(frozen=True)
class Codebook:
    """The values table[c] for code c = 0, …, 2^bits − 1, for every channel; the counterpart of ``Grid``.

    Attributes:
        quantizer: The quantizer that the table is of, such as ``"lq_nets"``.
        bits: Bit-width, 1 to 8.
        basis: The numbers that are stored and that the table is made of, float32, shape (*channel shape, numbers).
        table: The values in ascending order, float32, shape (*channel shape, 2^bits).
    """

    quantizer: str
    bits: int
    basis: Tensor
    table: Tensor

    @classmethod
    def of(cls, quantizer: str, bits: int, basis: Tensor) -> Codebook:
        """The codebook of a basis.

        Args:
            quantizer: A name of ``levels.CODEBOOKS``.
            bits: Bit-width, 1 to 8.
            basis: Stored numbers, shape (*channel shape, numbers).

        Example:
            >>> Codebook.of("lq_nets", 2, torch.tensor([[1.0, 2.0]])).table
            tensor([[-3., -1.,  1.,  3.]])
        """
        stored = basis.float()
        # Term by term in a fixed order: the same basis gives the same table to the last bit.
        table = torch.zeros(*stored.shape[:-1], 2**bits, device=stored.device)
        for number, row in zip(stored.unbind(-1), levels(quantizer, bits).float().to(stored.device), strict=True):
            table = table + number[..., None] * row
        return cls(quantizer, bits, stored, table.sort(-1).values)

    @property
    def width(self) -> int:
        """The bits; all channels have the same."""
        return self.bits

    @property
    def storage(self) -> int:
        """Bits that the basis takes."""
        return FLOAT_BITS * self.basis.numel()

    def tolerance(self, shape: Sequence[int]) -> Tensor:
        """How far a stored weight may be from its value for rounding's sake, in a shape that broadcasts to its own."""
        return 1e-5 * self.table.abs().amax(-1)

    def to(self, device: torch.device | str) -> Codebook:
        """The codebook on another device."""
        return Codebook(self.quantizer, self.bits, self.basis.to(device), self.table.to(device))

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest values, float32 whole numbers in the shape of ``weight``."""
        rows = self._rows(weight.float())
        return self._unrows(nearest_codes(self._tables(), rows).float(), weight.shape)

    def values(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, float32."""
        return self._unrows(self._tables().gather(1, self._rows(codes).long()), codes.shape)

    def nearest(self, weight: Tensor) -> Tensor:
        """Q_b(W): the weight rounded to the nearest values of the table, float32.

        Example:
            >>> codebook = Codebook.of("codebook", 1, torch.tensor([[0.0, 1.0]]))
            >>> codebook.nearest(torch.tensor([[-0.6, 0.4, 0.7]]))
            tensor([[0., 0., 1.]])
        """
        return self.values(self.codes(weight))

    def _tables(self) -> Tensor:
        """One row a channel, or a single one."""
        return self.table.reshape(-1, self.table.shape[-1])

    def _axis(self) -> int | None:
        return next((d for d, size in enumerate(self.table.shape[:-1]) if size > 1), None)

    def _rows(self, values: Tensor) -> Tensor:
        """Values with one row a table."""
        axis = self._axis()
        return values.reshape(1, -1) if axis is None else values.movedim(axis, 0).flatten(1)

    def _unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        axis = self._axis()
        if axis is None:
            return rows.reshape(shape)
        moved = torch.Size((shape[axis], *shape[:axis], *shape[axis + 1 :]))
        return rows.reshape(moved).movedim(0, axis).contiguous()


def nearest_codes(tables: Tensor, rows: Tensor) -> Tensor:
    """Place of the nearest value in each row's table; the lower one of two that are as near.

    Args:
        tables: Values in ascending order, shape (rows, 2^b).
        rows: What is rounded, shape (rows, weights).

    Returns:
        Whole numbers, int64, shape (rows, weights).

    Example:
        >>> nearest_codes(torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[-9.0, 0.6, 2.4, 2.6]]))
        tensor([[0, 1, 1, 2]])
    """
    tables, rows = tables.contiguous(), rows.contiguous()
    above = torch.searchsorted(tables, rows)
    below = (above - 1).clamp_min(0)
    above = above.clamp_max(tables.shape[1] - 1)
    nearer = tables.gather(1, above) - rows < rows - tables.gather(1, below)
    return torch.where(nearer, above, below)
