"""Lanczos: the eigenpairs of largest magnitude of a symmetric operator that is known by its products only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_caq.measures.hessian.krylov import Krylov

_FRESH = 10  # steps that a fresh start gets before its largest eigenvalues are judged


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
    should. Stops once the residual of each wanted pair is below ``tolerance`` times its own |λ_j|. Where the start
    vector's space is used up, as with repeated eigenvalues, the iteration starts afresh beside it.

    Args:
        product: v ↦ H v for a vector of shape (n,).
        start: Starting vector, shape (n,), not zero.
        k: Number of pairs, at most n.
        tolerance: Largest residual, relative to |λ_j|.
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
    space = Krylov(start, max_steps if max_steps is not None else 4 * k + 40, memory=memory)
    draws, fresh = torch.Generator().manual_seed(n), 0
    while True:
        space.extend(product(space.vector))
        small, inner = torch.linalg.eigh(space.matrix())
        order = small.abs().argsort(descending=True)[:k]
        residuals = space.beta * inner[-1, order].abs()
        # Relative to each pair's own eigenvalue: those far below λ_1 are wanted as exactly, down to rounding noise.
        noise = 10 * torch.finfo(start.dtype).eps * small.abs().max()
        reach = (tolerance * small[order].abs()).clamp_min(float(noise))
        if space.full:
            break
        if space.ended:
            space.restart(torch.randn(n, generator=draws).to(start))
            fresh = space.products + _FRESH
        # Looking at every step costs little beside a product, and no product too many is spent.
        elif space.products >= max(k, fresh) and bool((residuals <= reach).all()):
            break
    vectors = space.combine(inner[:, order])
    return Eigenpairs(small[order], vectors, residuals, residuals <= reach, space.products)
