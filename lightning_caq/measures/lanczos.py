"""Lanczos: the eigenpairs of largest magnitude of a symmetric operator that is known by its products only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FRESH = 10  # steps that a fresh start gets before its largest eigenvalues are judged
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs by magnitude.

    Attributes:
        values: λ_1, …, λ_m with |λ| descending, shape (m,), float64.
        vectors: v_1, …, v_m as columns, shape (n, m), in the dtype of the operator.
        residuals: ‖H v_j − λ_j v_j‖, shape (m,), float64; some eigenvalue lies that close to λ_j.
        converged: Whether the residual is within the tolerance, shape (m,), bool.
        products: Operator products that were spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_steps: int | None = None,
    memory: int = 2**31,
) -> Eigenpairs:
    """The ``k`` eigenpairs of largest magnitude, by Lanczos with full reorthogonalisation (CET §3.3).

    Every new basis vector is made orthogonal to all the others, twice, so no eigenvalue appears more often than it
    should. Stops once the residual of each wanted pair is below ``tolerance`` times |λ_1|. Where the start vector's
    space is used up, as with repeated eigenvalues, the iteration starts afresh beside it.

    Args:
        product: v ↦ H v for a vector of shape (n,).
        start: Starting vector, shape (n,), not zero.
        k: Number of pairs, at most n.
        tolerance: Largest residual, relative to |λ_1|.
        max_steps: Largest number of products; min(n, 4 k + 40) by default.
        memory: Bytes that the basis may take, 4 n a step in float32; a larger one is kept in a temporary file.

    Returns:
        The pairs, converged or not, as their flags say.

    Raises:
        ValueError: If ``k`` is not between 1 and n.

    Example:
        >>> H = torch.diag(torch.tensor([5.0, -3.0, 1.0, 0.5], dtype=torch.float64))
        >>> pairs = lanczos(lambda v: H @ v, torch.ones(4, dtype=torch.float64), k=2)
        >>> [round(x, 6) for x in pairs.values.tolist()], pairs.converged.tolist()
        ([5.0, -3.0], [True, True])
    """
    n = start.numel()
    if not 1 <= k <= n:
        raise ValueError(f"k={k} eigenpairs of an operator on {n} numbers are not to be had; choose 1 to {n}.")
    steps = min(n, max_steps if max_steps is not None else 4 * k + 40)
    draws = torch.Generator().manual_seed(n)
    diagonal: list[float] = []
    beside: list[float] = []
    with _basis(steps, start, memory) as basis:
        vector, fresh = _unit(start), 0
        for step in range(steps):
            basis[step] = vector
            image = product(vector)
            diagonal.append(float(torch.dot(vector.double(), image.double())))
            image = _orthogonal(image, basis, step + 1)
            beta = float(image.norm(dtype=torch.float64))
            small, inner = torch.linalg.eigh(_tridiagonal(diagonal, beside))
            order = small.abs().argsort(descending=True)[:k]
            residuals = beta * inner[-1, order].abs()
            largest = float(small.abs().max())
            # Looking at every step costs little beside a product, and no product too many is spent.
            if step + 1 == steps:
                break
            used_up = beta <= 1e-9 * largest
            if not used_up and step + 1 >= max(k, fresh) and bool((residuals <= tolerance * largest).all()):
                break
            if used_up:
                image = _orthogonal(torch.randn(n, generator=draws).to(start), basis, step + 1)
                fresh = step + 1 + _FRESH
            beside.append(0.0 if used_up else beta)
            vector = _unit(image)
        vectors = _combine(basis, inner[:, order].to(basis.dtype))
    return Eigenpairs(small[order], vectors, residuals, residuals <= tolerance * largest, len(diagonal))


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm(dtype=torch.float64)
    return vector / length.to(vector.dtype)


def _orthogonal(vector: Tensor, basis: Tensor, rows: int) -> Tensor:
    """What is left of a vector beside the basis; the second round removes what rounding left in the first."""
    for _ in range(2):
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = basis[start : min(start + _ROWS_AT_ONCE, rows)].to(vector.device)
            vector = vector - block.T @ (block @ vector)
    return vector


def _combine(basis: Tensor, coefficients: Tensor) -> Tensor:
    """basisᵀ · coefficients, a few rows at a time, shape (n, k)."""
    total = coefficients.new_zeros(basis.shape[1], coefficients.shape[1])
    for start in range(0, len(coefficients), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(coefficients))
        total += basis[start:stop].T @ coefficients[start:stop].to(basis.device)
    return total


@contextmanager
def _basis(steps: int, like: Tensor, memory: int) -> Iterator[Tensor]:
    """Room for the basis, shape (steps, n): in memory, or in a temporary file where it would take too much."""
    if steps * like.numel() * like.element_size() <= memory:
        yield like.new_empty(steps, like.numel())
        return
    with tempfile.TemporaryDirectory(prefix="caq-lanczos-") as folder:
        kind = np.dtype(str(like.dtype).removeprefix("torch."))
        held = np.memmap(Path(folder) / "basis", dtype=kind, mode="w+", shape=(steps, like.numel()))
        yield torch.from_numpy(held)
        del held


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
