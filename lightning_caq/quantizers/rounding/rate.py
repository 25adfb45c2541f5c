"""Rate: rounding that weighs the bits of every code against the error it makes.

Codes are whole numbers without bounds. A layer's cost is its squared output error in units of its squared step, plus λ
times the bits of its codes (entropy-constrained quantization, Chou, Lookabaugh & Gray 1989), and columns not yet
rounded absorb the error of those that are (GPTQ, Frantar et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.rounding.moments import damped

SLOPE = 0.1
"""λ over the mean squared error that a column cannot pass on, in squared steps a bit."""

LARGEST = 64
"""Magnitudes from here up are taken to cost the same bits."""

_BLOCK = 64
_PASSES = 2  # the bits that codes cost depend on how often they are used
_PRIOR = 10


def inverse_factors(curvature: Tensor) -> Tensor:
    """Upper factors U of the damped inverse, H⁻¹ = UᵀU, columns in their own order; shape of ``curvature``, float32.

    Columns keep their order: codes of one kernel then stay together, which the coder of the codes makes use of, and the
    order was seen to make no difference to the error.

    Example:
        >>> inverse_factors(4 * torch.eye(2)[None]).diagonal(dim1=1, dim2=2).round(decimals=2)
        tensor([[0.5000, 0.5000]])
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(curvature)))
    factors: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factors.float()


def magnitude_bits(magnitudes: Tensor) -> Tensor:
    """Bits of codes of magnitude 0, 1, …, ``LARGEST``, their sign included, as often as these occur.

    Args:
        magnitudes: Magnitudes of codes, one-dimensional.

    Returns:
        Shape (LARGEST + 1,), float32; a geometric law stands in where codes are few.

    Example:
        >>> [round(x, 2) for x in magnitude_bits(torch.tensor([0.0, 1.0] * 5000))[:2].tolist()]
        [1.0, 2.0]
    """
    kept = magnitudes.clamp(max=LARGEST)
    counts = torch.bincount(kept.long(), minlength=LARGEST + 1).double()
    mean = kept.double().mean() + 0.01 if len(kept) else torch.tensor(0.5, device=kept.device)
    law = (mean / (1 + mean)) ** torch.arange(LARGEST + 1, device=kept.device)
    bits = -((counts + _PRIOR * law / law.sum()) / (counts.sum() + _PRIOR)).log2()
    bits[1:] += 1
    return bits.float()


def round_rate(matrices: Tensor, curvature: Tensor | None, step: float, slope: float = SLOPE) -> Tensor:
    """Codes of a layer, one column after the other.

    Args:
        matrices: The weight, shape (groups, outputs, columns).
        curvature: E[z zᵀ], shape (groups, columns, columns); ``None`` where columns do not interact, as in embeddings.
        step: Distance of neighbouring values.
        slope: λ, see ``SLOPE``; 0 rounds to the nearest values.

    Returns:
        Whole numbers in the shape of ``matrices``, float32; the weight is step · codes.

    Example:
        >>> w = torch.tensor([[[0.4, 0.51, 3.1, 0.0]]])
        >>> round_rate(w, None, 1.0, slope=0.0), round_rate(w, None, 1.0)
        (tensor([[[0., 1., 3., 0.]]]), tensor([[[0., 0., 3., 0.]]]))
    """
    x = matrices.float() / step
    codes = x.round()
    if curvature is None:
        for _ in range(_PASSES):
            codes = _cheapest(x, slope * magnitude_bits(codes.abs().flatten()))
        return codes
    factors = inverse_factors(curvature)
    weight = 1 / factors.diagonal(dim1=1, dim2=2).square()  # what a squared error costs that no column takes over
    mean = weight.log().mean().exp()
    for _ in range(_PASSES):
        prices = slope * magnitude_bits(codes.abs().flatten()) * mean
        codes = torch.stack([_feedback(*each, prices) for each in zip(x, factors, weight, strict=True)])
    return codes


def refit_step(matrices: Tensor, codes: Tensor, curvature: Tensor | None, step: float) -> float:
    """The step that makes the output error least for codes that are given, s = (w H c) / (c H c).

    Args:
        matrices: The weight, shape (groups, outputs, columns).
        codes: Its codes, same shape.
        curvature: E[z zᵀ], or ``None``.
        step: The step that codes were chosen for, which is kept where they are all zero.

    Example:
        >>> refit_step(torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 0.0]]]), None, 1.0)
        0.5
    """
    w, c = matrices.double(), codes.double()
    pulled = c if curvature is None else c @ damped(curvature)
    square = float((c * pulled).sum())
    best = float((w * pulled).sum()) / square if square > 0 else 0.0
    return best if best > 0 else step


def distortion(matrices: Tensor, values: Tensor, curvature: Tensor | None) -> float:
    """Mean squared error of a weight, had each an error of its own that no other takes over.

    Error feedback leaves the output error Σ_j d_j D_j, d_j what column j's error costs after those behind it took over
    what they can. At the best rate d_j D_j is the same for all columns, so that D has the geometric mean (mean of
    e H eᵀ a weight) / d̄.

    Args:
        matrices: The weight, shape (groups, outputs, columns).
        values: What it was rounded to.
        curvature: E[z zᵀ], or ``None``, where it is the plain mean.

    Example:
        >>> distortion(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 2.0]]]), None)
        2.0
    """
    e = (values - matrices).double()
    if curvature is None:
        return float(e.square().mean())
    costs = inverse_factors(curvature).diagonal(dim1=1, dim2=2).double().log().mean().mul(-2).exp()
    return float(((e @ damped(curvature)) * e).sum() / costs / max(e.numel(), 1))


def _feedback(matrix: Tensor, factor: Tensor, weight: Tensor, prices: Tensor) -> Tensor:
    """Codes of one group; the matrix has shape (outputs, columns)."""
    w = matrix.T.contiguous()  # columns become rows: what the loop touches then lies together in memory
    codes = torch.empty_like(w)
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            codes[j] = _cheapest(w[j], prices / weight[j])
            errors[j - start] = (w[j] - codes[j]) / factor[j, j]
            w[j:stop].addr_(factor[j, j:stop], errors[j - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T


def _cheapest(x: Tensor, prices: Tensor) -> Tensor:
    """Of the nearest whole number, the one next to it towards zero, and zero, the one with least error and price."""
    size = x.abs()
    near = size.round()
    smaller = (near - 1).clamp_min(0)
    best, cost = near, _cost(size, near, prices)
    for other in (smaller, torch.zeros_like(near)):
        price = _cost(size, other, prices)
        best, cost = torch.where(price < cost, other, best), torch.minimum(price, cost)
    return best.copysign(x)


def _cost(size: Tensor, code: Tensor, prices: Tensor) -> Tensor:
    return (size - code).square() + prices[code.clamp(max=LARGEST).long()]
