"""Bases: the stored numbers of a codebook by least squares, with fixed codes or in turns with them."""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-10


def fit_basis(rows: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """The basis v that minimises Σ (w − Σ_k v_k levels[k, c])² for fixed codes c.

    Args:
        rows: Weights w, float64, shape (rows, weights).
        codes: Their codes, int64, same shape.
        levels: Shape (numbers, codes).

    Returns:
        The bases, float64, shape (rows, numbers); the smallest one where several serve.

    Example:
        >>> levels = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
        >>> fit_basis(torch.tensor([[-1.0, 3.0]], dtype=torch.float64), torch.tensor([[0, 1]]), levels)
        tensor([[2.0000]], dtype=torch.float64)
    """
    empty = rows.new_zeros(len(rows), levels.shape[1])
    counts = empty.scatter_add(1, codes, torch.ones_like(rows))
    return _regress(counts, empty.scatter_add(1, codes, rows), levels, rows.new_zeros(len(rows), len(levels)))


def refine_basis(rows: Tensor, basis: Tensor, levels: Tensor, rounds: int) -> Tensor:
    """Lloyd's iteration: each weight takes the nearest value, then the basis follows by least squares, in turns.

    The squared error never grows. Rows are sorted once; the weights of one value are then an interval of its row.

    Args:
        rows: Weights, float64, shape (rows, weights).
        basis: Where to start, float64, shape (rows, numbers).
        levels: Shape (numbers, codes).
        rounds: Turns at most; fewer where no weight changes its value any more.

    Returns:
        The bases, float64, shape (rows, numbers).

    Example:
        >>> points, start = torch.tensor([[0.0, 1.0, 8.0, 9.0]]).double(), torch.tensor([[0.0, 9.0]]).double()
        >>> refine_basis(points, start, torch.eye(2).double(), rounds=10)
        tensor([[0.5000, 8.5000]], dtype=torch.float64)
    """
    points = rows.sort(1).values
    sums = torch.cat([points.new_zeros(len(points), 1), points.cumsum(1)], 1)
    first = torch.zeros(len(points), 1, dtype=torch.int64, device=points.device)
    cuts = first
    for _ in range(rounds):
        values, order = (basis @ levels).sort(dim=1, stable=True)
        between = torch.searchsorted(points, ((values[:, 1:] + values[:, :-1]) / 2).contiguous())
        before, cuts = cuts, torch.cat([first, between, first + points.shape[1]], 1)
        if torch.equal(before, cuts):
            break
        empty = torch.zeros_like(values)
        counts = empty.scatter(1, order, cuts.diff(dim=1).to(values.dtype))
        basis = _regress(counts, empty.scatter(1, order, sums.gather(1, cuts).diff(dim=1)), levels, basis)
    return basis


def squared_errors(rows: Tensor, values: Tensor) -> Tensor:
    """Σ (w − nearest value)² of each row.

    Args:
        rows: Weights, shape (rows, weights).
        values: The values in any order, shape (rows, codes).

    Example:
        >>> squared_errors(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([1.])
    """
    ascending = values.sort(1).values
    between = ((ascending[:, 1:] + ascending[:, :-1]) / 2).contiguous()
    nearest = ascending.gather(1, torch.searchsorted(between, rows.contiguous()))
    return (rows - nearest).square().sum(1)


def _regress(counts: Tensor, sums: Tensor, levels: Tensor, prior: Tensor) -> Tensor:
    """Least squares from the number and the sum of the weights at each code; ``prior`` where they say nothing."""
    ridge = _RIDGE * counts.sum(1, keepdim=True).clamp_min(1)
    gram = (levels * counts[:, None]) @ levels.T + ridge[..., None] * torch.eye(len(levels)).to(levels)
    basis: Tensor = torch.linalg.solve(gram, sums @ levels.T + ridge * prior)
    return basis
