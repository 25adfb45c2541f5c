"""Folded rows: rows of A_i kept in few numbers, where those of all layers would not fit in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_caq.measures.gram.row_forms import by_owner


class FoldedRows:
    """Rows that are folded as they are put away, after everything that can be taken from a row by itself.

    A row of n numbers keeps d: number j is added to place j mod d with a random sign (count sketch: Charikar, Chen and
    Farach-Colton 2002). Inner products of two rows a and b are then right in the mean, with a variance of at most
    (‖a‖² ‖b‖² + ⟨a, b⟩²) / d. Norms of rows and their products with errors are exact.

    Args:
        rows: Number of rows.
        width: d, numbers kept of each.
        signs: Random signs, int8, shape (n,).
        bits: Bit-widths whose errors rows are multiplied with.
        delta: The error Δ of a bit-width, as matrices of shape (groups, outputs, columns).
        owner: Whose an output is, whole numbers from 0, shape (groups, outputs); ``None`` where all belong together.
        like: A tensor of the type and device of the rows.

    Attributes:
        projected: Bits to A_i Δ, shape (rows, owners), float64.

    Example:
        >>> signs, delta = torch.tensor([1, 1, -1], dtype=torch.int8), torch.tensor([[[1.0, 0.0, 1.0]]])
        >>> rows = FoldedRows(1, 2, signs, [3], lambda _: delta, None, torch.zeros(1))
        >>> rows.put(slice(0, 1), torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0, 2.0, 4.0]]]]))
        >>> rows.folded, rows.gram(), rows.projected[3]
        (tensor([[-3.,  2.]]), tensor([[21.]]), tensor([[5.]], dtype=torch.float64))
    """

    def __init__(
        self,
        rows: int,
        width: int,
        signs: Tensor,
        bits: Sequence[int],
        delta: Callable[[int], Tensor],
        owner: Tensor | None,
        like: Tensor,
    ) -> None:
        owners = 1 if owner is None else int(owner.max()) + 1
        self._signs, self._delta, self._owner = signs.to(like.device), delta, owner
        self.folded = torch.zeros(rows, min(width, len(signs)), dtype=like.dtype, device=like.device)
        self._squares = torch.zeros(rows, dtype=like.dtype, device=like.device)
        self.projected = {b: torch.zeros(rows, owners, dtype=torch.float64, device=like.device) for b in bits}

    def put(self, place: slice, gradients: Tensor, inputs: Tensor) -> None:
        """Put away some rows, with the positions of all calls of the layer.

        Args:
            place: The rows.
            gradients: g_t, shape (rows, groups, positions, outputs).
            inputs: x_t, shape (rows, groups, positions, columns).
        """
        self.put_dense(place, (gradients.transpose(2, 3) @ inputs).flatten(1))

    def put_dense(self, place: slice, dense: Tensor) -> None:
        """Put away some rows that are there as they are, shape (rows, n)."""
        dense = dense.to(self.folded)
        self._squares[place] = dense.square().sum(1)
        for b, projected in self.projected.items():
            projected[place] = self._project(dense, self._delta(b).to(dense)).double()
        self.folded[place] = self._fold(dense)

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows); exact on the diagonal."""
        gram = self.folded @ self.folded.T
        gram.diagonal().copy_(self._squares)
        return gram

    def _project(self, dense: Tensor, delta: Tensor) -> Tensor:
        if self._owner is None:
            return (dense @ delta.flatten())[:, None]
        along = torch.einsum("roc,oc->ro", dense.unflatten(1, (self._owner.numel(), -1)), delta.flatten(0, 1))
        return by_owner(along, self._owner)

    def _fold(self, dense: Tensor) -> Tensor:
        width = self.folded.shape[1]
        if width == dense.shape[1]:
            return dense
        folded = dense.new_zeros(len(dense), width)
        for part, signs in zip(dense.split(width, 1), self._signs.split(width), strict=True):
            folded[:, : part.shape[1]].addcmul_(part, signs.to(dense.dtype))
        return folded


def largest_width(sizes: Sequence[int], numbers: int) -> int:
    """The largest d with which a row of every layer takes no more than so many numbers.

    Args:
        sizes: Numbers of a row of each layer.
        numbers: What one row of all layers may take.

    Returns:
        d, at least 1.

    Example:
        >>> largest_width([100, 2500], 300)  # the first layer as it is, the second in 200
        200
    """
    left = sorted(sizes)
    while left and left[0] <= numbers / len(left):
        numbers -= left.pop(0)
    return max(int(numbers / len(left)), 1) if left else max(sizes)
