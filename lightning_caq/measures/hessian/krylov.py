"""Lanczos's recursion: a symmetric operator, known by its products only, becomes a small tridiagonal matrix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ROWS = 64  # rows of the basis that are worked on at a time


class Krylov:
    """The recursion, one product at a time, so that the caller decides when to stop and what shares a pass.

    Q T Qᵀ is the operator seen from span{v, H v, H² v, …}: T is tridiagonal and the rows of Q are orthonormal. Every
    new row is made orthogonal to all the others, twice, so no eigenvalue appears more often than it should.

    Args:
        start: Starting vector v, shape (n,), not zero.
        steps: Most products.
        memory: Bytes that the basis may take, in float32 4 n a step; a larger one is kept in a temporary file.

    Attributes:
        vector: What to multiply next, of norm 1.
        products: Products taken so far.
        ended: Whether no step is left, or the space has closed: H maps it into itself.
        beta: Norm of what the last product had outside the space.

    Example:
        >>> H = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
        >>> space = Krylov(torch.ones(2, dtype=torch.float64), steps=2)
        >>> while not space.ended:
        ...     space.extend(H @ space.vector)
        >>> [round(x, 6) for x in torch.linalg.eigvalsh(space.matrix()).tolist()]
        [1.0, 2.0]
    """

    def __init__(self, start: Tensor, steps: int, *, memory: int = 2**31) -> None:
        self._basis = _room(min(steps, start.numel()), start, memory)
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self.vector = _unit(start)
        self.beta = 0.0
        self.ended = False

    @property
    def products(self) -> int:
        """Products taken so far, the size of the matrix."""
        return len(self._diagonal)

    @property
    def full(self) -> bool:
        """Whether no step is left."""
        return self.products == len(self._basis)

    @property
    def basis(self) -> Tensor:
        """Orthonormal rows Q, shape (products, n)."""
        return self._basis[: self.products]

    def extend(self, image: Tensor) -> None:
        """Take in the product of the operator with ``vector``."""
        if self._diagonal:
            self._beside.append(self.beta)
        self._basis[self.products] = self.vector
        self._diagonal.append(float(torch.dot(self.vector.double(), image.double())))
        before = float(image.norm(dtype=torch.float64))
        image = self._beside_basis(image)
        self.beta = float(image.norm(dtype=torch.float64))
        # What rounding leaves of a vector that lies in the space is no new direction.
        closed = self.beta <= torch.finfo(image.dtype).eps ** 0.75 * max(before, *map(abs, self._diagonal), 1e-300)
        self.ended = closed or self.full
        if closed:
            self.beta = 0.0
        if not self.ended:
            self.vector = _unit(image)

    def restart(self, vector: Tensor) -> None:
        """Go on beside a space that has closed, from what a vector has outside it."""
        self.vector = _unit(self._beside_basis(vector))
        self.ended = False

    def combine(self, coefficients: Tensor) -> Tensor:
        """Qᵀ · coefficients, shape (n, columns) for coefficients of shape (products, columns)."""
        total = torch.zeros(self.vector.numel(), coefficients.shape[1]).to(self.vector)
        for rows, part in zip(self.basis.split(_ROWS), coefficients.to(total).split(_ROWS), strict=True):
            total += rows.to(total).T @ part
        return total

    def _beside_basis(self, vector: Tensor) -> Tensor:
        """What a vector has outside the space; the second round takes what rounding left in the first."""
        for _ in range(2):
            for rows in self.basis.split(_ROWS):
                rows = rows.to(vector)
                vector = vector - rows.T @ (rows @ vector)
        return vector

    def matrix(self) -> Tensor:
        """T = Q H Qᵀ, shape (products, products), float64."""
        diagonal = torch.tensor(self._diagonal, dtype=torch.float64)
        beside = torch.tensor(self._beside, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm(dtype=torch.float64)
    return vector / length.to(vector.dtype)


def _room(steps: int, like: Tensor, memory: int) -> Tensor:
    """Room for a basis: in memory, or in a temporary file, which is gone once nothing refers to it."""
    if steps * like.numel() * like.element_size() <= memory:
        return like.new_empty(steps, like.numel())
    kind = np.dtype(str(like.dtype).removeprefix("torch."))
    with tempfile.TemporaryFile(prefix="caq-basis-") as file:
        return torch.from_numpy(np.memmap(file, dtype=kind, mode="w+", shape=(steps, like.numel())))


def tridiagonalise(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Krylov:
    """Run the recursion to its end.

    Args:
        product: v ↦ H v for a vector of shape (n,).
        start: Starting vector, not zero.
        steps: Most products.

    Returns:
        The space; its ``matrix`` is T.

    Example:
        >>> tridiagonalise(lambda v: 3 * v, torch.ones(4), steps=3).matrix()  # every vector is an eigenvector
        tensor([[3.]], dtype=torch.float64)
    """
    space = Krylov(start, steps)
    while not space.ended:
        space.extend(product(space.vector))
    return space
