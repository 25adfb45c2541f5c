"""Lanczos's recursion: a symmetric operator, known by its products only, becomes a small tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Krylov:
    """The recursion, one product at a time, so that the caller decides when to stop and what shares a pass.

    Q T Qᵀ is the operator seen from span{v, H v, H² v, …}: T is tridiagonal and the rows of Q are orthonormal. Every
    new row is made orthogonal to all the others, twice, so no eigenvalue appears more often than it should.

    Args:
        start: Starting vector v, shape (n,), not zero.
        steps: Most products; the basis takes steps · n numbers.

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

    def __init__(self, start: Tensor, steps: int) -> None:
        self._basis = start.new_empty(min(steps, start.numel()), start.numel())
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self.vector = start / start.norm(dtype=torch.float64).to(start.dtype)
        self.beta = 0.0
        self.ended = False

    @property
    def products(self) -> int:
        """Products taken so far, the size of the matrix."""
        return len(self._diagonal)

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
        for _ in range(2):
            image = image - self.basis.T @ (self.basis @ image)
        self.beta = float(image.norm(dtype=torch.float64))
        # What rounding leaves of a vector that lies in the space is no new direction.
        closed = self.beta <= 10 * torch.finfo(image.dtype).eps * max(before, *map(abs, self._diagonal), 1e-300)
        self.ended = closed or self.products == len(self._basis)
        if closed:
            self.beta = 0.0
        if not self.ended:
            self.vector = image / self.beta

    def matrix(self) -> Tensor:
        """T = Q H Qᵀ, shape (products, products), float64."""
        diagonal = torch.tensor(self._diagonal, dtype=torch.float64)
        beside = torch.tensor(self._beside, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)


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
