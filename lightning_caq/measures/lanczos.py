"""Lanczos: the eigenpairs of largest magnitude of a symmetric operator that is known by its products only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs by magnitude.

    Attributes:
        values: λ_1, …, λ_m with |λ| descending, shape (m,), float64.
        vectors: v_1, …, v_m as columns, shape (n, m), in the dtype of the operator.
        residuals: ‖H v_j − λ_j v_j‖, shape (m,), float64; some eigenvalue lies that close to λ_j.
        products: Operator products that were spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_steps: int | None = None,
) -> Eigenpairs:
    """The ``k`` eigenpairs of largest magnitude, by Lanczos with full reorthogonalisation (CET §3.3).

    Every new basis vector is made orthogonal to all the others, twice, so no eigenvalue appears more than once than it
    should. Stops once the residual of each wanted pair is below ``tolerance`` times |λ_1|.

    Args:
        product: v ↦ H v for a vector of shape (n,).
        start: Starting vector, shape (n,), not zero.
        k: Number of pairs, at most n.
        tolerance: Largest residual, relative to |λ_1|.
        max_steps: Largest number of products; min(n, 4 k + 40) by default.

    Returns:
        The pairs; fewer than ``k`` where the operator has fewer that the starting vector can reach.

    Example:
        >>> H = torch.diag(torch.tensor([5.0, -3.0, 1.0, 0.5], dtype=torch.float64))
        >>> pairs = lanczos(lambda v: H @ v, torch.ones(4, dtype=torch.float64), k=2)
        >>> [round(x, 6) for x in pairs.values.tolist()]
        [5.0, -3.0]
    """
    n = start.numel()
    k = min(k, n)
    steps = min(n, max_steps if max_steps is not None else 4 * k + 40)
    basis = start.new_empty(steps, n)
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / start.norm(dtype=torch.float64).to(start.dtype)
    for step in range(steps):
        basis[step] = vector
        image = product(vector)
        diagonal.append(float(torch.dot(vector.double(), image.double())))
        for _ in range(2):
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        beta = float(image.norm(dtype=torch.float64))
        small, inner = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        order = small.abs().argsort(descending=True)[:k]
        residuals = beta * inner[-1, order].abs()
        largest = float(small.abs().max())
        done = beta <= 1e-12 * max(largest, 1e-300) or step + 1 == steps
        # Looking again at every step costs little beside a product and spends no product too many.
        if done or (step + 1 >= k and bool((residuals <= tolerance * largest).all())):
            break
        beside.append(beta)
        vector = image / beta
    vectors = basis[: len(diagonal)].T @ inner[:, order].to(basis.dtype)
    return Eigenpairs(small[order], vectors, residuals, len(diagonal))


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
