"""Row forms: how the rows of A_i are held, as they are or by the factors that they are made of.

A row of A_i is the gradient of one output by a layer's weight, Σ_t g_t x_tᵀ over the positions t at which the layer is
applied. With few positions the factors take less room than the row, and less work:
⟨Σ_t g_t x_tᵀ, Σ_s h_s y_sᵀ⟩ = Σ_ts ⟨g_t, h_s⟩ ⟨x_t, y_s⟩. The words of an embedding are one-hot x_t, of which only the
place of the one is held.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_NUMBERS = 2**22  # numbers in one block of pairs, 16 MB

Device = torch.device | None
"""Where rows are held; on the CPU by default."""


class DenseRows:
    """Rows as they are.

    Attributes:
        rows: Shape (rows, groups · outputs · columns).
    """

    def __init__(
        self, rows: int, groups: int, outputs: int, columns: int, dtype: torch.dtype, device: Device = None
    ) -> None:
        self.rows = torch.zeros(rows, groups * outputs * columns, dtype=dtype, device=device)

    def put(self, place: slice, gradients: Tensor, inputs: Tensor) -> None:
        """Add to some rows what one call of the layer gave.

        Args:
            place: The rows.
            gradients: g_t, shape (rows, groups, positions, outputs).
            inputs: x_t, shape (rows, groups, positions, columns).
        """
        self.rows[place] += (gradients.transpose(2, 3) @ inputs).flatten(1).to(self.rows)

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows)."""
        return self.rows @ self.rows.T

    def project(self, delta: Tensor) -> Tensor:
        """A_i Δ for an error given as matrices, shape (groups, outputs, columns); result of shape (rows,)."""
        return self.rows @ delta.flatten().to(self.rows)

    def project_by(self, delta: Tensor, owner: Tensor) -> Tensor:
        """A_i Δ in parts: one for each owner of outputs.

        Args:
            delta: The error as matrices, shape (groups, outputs, columns).
            owner: Whose an output is, whole numbers from 0, shape (groups, outputs).

        Returns:
            Shape (rows, owners); their sum over owners is ``project(delta)``.
        """
        rows = self.rows.unflatten(1, (owner.numel(), -1))
        return by_owner(torch.einsum("roc,oc->ro", rows, delta.flatten(0, 1).to(rows)), owner)

    def squares(self) -> Tensor:
        """Sum of the squares of the rows, number by number."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=0)
        return norms.square()

    def combine(self, mix: Tensor) -> Tensor:
        """A_iᵀ M, sums of rows.

        Args:
            mix: M, shape (rows, k).

        Returns:
            Shape (groups · outputs · columns, k).
        """
        return self.rows.T @ mix.to(self.rows)


class FactoredRows:
    """Rows by their factors g_t and x_t.

    Attributes:
        gradients: g_t, shape (rows, groups, positions, outputs); zeros where a row has fewer positions.
        inputs: x_t, shape (rows, groups, positions, columns).
    """

    def __init__(
        self,
        rows: int,
        groups: int,
        outputs: int,
        columns: int,
        positions: int,
        dtype: torch.dtype,
        device: Device = None,
    ) -> None:
        self.gradients = torch.zeros(rows, groups, positions, outputs, dtype=dtype, device=device)
        self.inputs = torch.zeros(rows, groups, positions, columns, dtype=dtype, device=device)

    def put(self, place: slice, gradients: Tensor, inputs: Tensor) -> None:
        """Write some rows, with the positions of all calls of the layer; shapes as above."""
        missing = gradients.shape[2] - self.gradients.shape[2]
        if missing > 0:  # a later batch has longer samples than the first
            self.gradients = F.pad(self.gradients, (0, 0, 0, missing))
            self.inputs = F.pad(self.inputs, (0, 0, 0, missing))
        self.gradients[place, :, : gradients.shape[2]] = gradients.to(self.gradients)
        self.inputs[place, :, : inputs.shape[2]] = inputs.to(self.inputs)

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows), block by block."""
        rows, groups, positions, _ = self.gradients.shape
        step = max(1, isqrt(_BLOCK_NUMBERS // groups) // positions)
        result = self.gradients.new_zeros(rows, rows)
        for a in range(0, rows, step):
            for b in range(a, rows, step):
                first, second = slice(a, a + step), slice(b, b + step)
                pairs = _pairs(self.gradients[first], self.gradients[second])
                pairs *= _pairs(self.inputs[first], self.inputs[second])
                block = pairs.sum(0).unflatten(0, (-1, positions)).unflatten(2, (-1, positions)).sum((1, 3))
                result[first, second] = block
                result[second, first] = block.T
        return result

    def project(self, delta: Tensor) -> Tensor:
        """A_i Δ for an error given as matrices, shape (groups, outputs, columns); result of shape (rows,)."""
        moved = self.inputs @ delta.transpose(1, 2).to(self.inputs)  # Δ x_t
        return (moved * self.gradients).sum((1, 2, 3))

    def project_by(self, delta: Tensor, owner: Tensor) -> Tensor:
        """A_i Δ in parts: one for each owner of outputs; shapes as for dense rows."""
        moved = self.inputs @ delta.transpose(1, 2).to(self.inputs)
        return by_owner((moved * self.gradients).sum(2).flatten(1), owner)

    def squares(self) -> Tensor:
        """Sum of the squares of the rows, number by number, shape (groups, outputs, columns)."""
        g, x = self.gradients, self.inputs
        if g.shape[2] == 1:  # (g_o x_c)²
            return torch.einsum("rgto,rgtc->goc", g.square(), x.square())
        step = max(1, _BLOCK_NUMBERS // (g[0, :, 0].numel() * x.shape[3]))
        blocks = zip(g.split(step), x.split(step), strict=True)
        return torch.stack([(a.transpose(2, 3) @ b).square().sum(0) for a, b in blocks]).sum(0)

    def combine(self, mix: Tensor) -> Tensor:
        """A_iᵀ M, sums of rows; shapes as for dense rows."""
        g, x = self.gradients.transpose(0, 1).flatten(1, 2), self.inputs.transpose(0, 1).flatten(1, 2)
        positions = self.gradients.shape[2]
        if not mix.shape[1]:  # outputs that are saturated have no curvature
            return g.new_zeros(g.shape[0] * g.shape[2] * x.shape[2], 0)
        sums = [(g * m.repeat_interleave(positions)[:, None]).transpose(1, 2) @ x for m in mix.to(g).T]
        return torch.stack(sums, dim=-1).flatten(0, 2)


class WordRows:
    """Rows of an embedding: gradients of the words that a sample holds, zeros for all the others.

    Args:
        rows: Number of rows.
        words: Which words of the table.
        width: Numbers of a word.
        dtype: Of the gradients.
        device: Where to hold them.
    """

    def __init__(self, rows: int, words: range, width: int, dtype: torch.dtype, device: Device = None) -> None:
        self._rows, self._words = rows, words
        # word · rows + row, so that sorting goes by words
        self._keys = [torch.empty(0, dtype=torch.long, device=device)]
        self._values = [torch.empty(0, width, dtype=dtype, device=device)]

    def put(self, place: slice, gradients: Tensor, words: Tensor) -> None:
        """Add to some rows what one call gave.

        Args:
            place: The rows.
            gradients: Shape (rows, positions, width).
            words: Shape (rows, positions).
        """
        words = words.to(self._keys[0]) - self._words.start
        keys = words * self._rows + torch.arange(place.start, place.stop, device=words.device)[:, None]
        here = (words >= 0) & (words < len(self._words))
        self._keys.append(keys[here])
        self._values.append(gradients.to(self._values[0])[here])

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows): the sum over words of what the rows that hold a word have in common."""
        words, rows, values = self._entries()
        result = values.new_zeros(self._rows, self._rows)
        counts = words.unique_consecutive(return_counts=True)[1].tolist()
        for index, part in zip(rows.split(counts), values.split(counts), strict=True):
            result[index[:, None], index] += part @ part.T
        return result

    def project(self, delta: Tensor) -> Tensor:
        """A_i Δ for an error given as matrices, shape (1, words, width); result of shape (rows,)."""
        words, rows, values = self._entries()
        along = (values * delta[0].to(values)[words]).sum(1)
        return values.new_zeros(self._rows).index_add(0, rows, along)

    def project_by(self, delta: Tensor, owner: Tensor) -> Tensor:
        """A_i Δ in parts: one for each owner of words; shapes as for dense rows."""
        words, rows, values = self._entries()
        along = (values * delta[0].to(values)[words]).sum(1)
        count = int(owner.max()) + 1
        places = rows * count + owner.to(words.device)[0, words]
        return values.new_zeros(self._rows * count).index_add(0, places, along).view(-1, count)

    def squares(self) -> Tensor:
        """Sum of the squares of the rows, number by number, shape (words, width)."""
        words, _, values = self._entries()
        return values.new_zeros(len(self._words), values.shape[1]).index_add(0, words, values.square())

    def combine(self, mix: Tensor) -> Tensor:
        """A_iᵀ M, sums of rows; shapes as for dense rows, (words · width, k)."""
        words, rows, values = self._entries()
        mix = mix.to(values)
        sums = [values.new_zeros(len(self._words), values.shape[1]).index_add(0, words, m[rows, None] * values)
                for m in mix.T]  # fmt: skip
        return torch.stack(sums, dim=-1).flatten(0, 1)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Word, row and gradient of every word of every row, each pair once, word by word."""
        keys, place = torch.cat(self._keys).unique(return_inverse=True)
        values = torch.cat(self._values)
        values = values.new_zeros(len(keys), values.shape[1]).index_add(0, place, values)
        self._values, self._keys = [values], [keys]
        return keys // self._rows, keys % self._rows, values


ExactRows = DenseRows | FactoredRows | WordRows


def by_owner(parts: Tensor, owner: Tensor) -> Tensor:
    """Sums over the outputs of each owner; parts of shape (rows, outputs of all groups)."""
    owner = owner.flatten().to(parts.device)
    return parts.new_zeros(len(parts), int(owner.max()) + 1).index_add(1, owner, parts)


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of all positions of some rows with all of others, shape (groups, rows · t, rows · t)."""
    return left.transpose(0, 1).flatten(1, 2) @ right.transpose(0, 1).flatten(1, 2).transpose(1, 2)
