"""Hutchinson and Hutch++: traces from products with random signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.special import stdtrit
from torch import Tensor

_LEAST_PROBES = 4


class LayerOperator(Protocol):
    """What traces are taken of, such as ``Hessian`` or ``GaussNewton``: blocks H_ii, one a layer."""

    sizes: list[int]

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector of n numbers as one tensor a layer."""
        ...

    def like(self, vector: Tensor) -> Tensor:
        """A vector in the dtype and on the device of the weights."""
        ...

    def layer_products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H_ii v_i of every layer."""
        ...


@dataclass(frozen=True)
class LayerTraces:
    """tr(H_ii) of every layer, nat/weight².

    Attributes:
        values: Traces, shape (layers,), float64.
        errors: Standard errors, shape (layers,), float64. An interval is the value ± Student's t with probes − 1
            degrees of freedom times the error: 3.2 for 95 % after 4 probes, 2 after many.
        probes: Probes that the errors rest on.
        products: Products with every layer that were spent, those for the subspace included.
        converged: Whether each layer's error is within the tolerance, shape (layers,), bool.
    """

    values: Tensor
    errors: Tensor
    probes: int
    products: int
    converged: Tensor


def estimate_layer_traces(
    operator: LayerOperator,
    generators: Sequence[torch.Generator],
    *,
    tolerance: float = 0.05,
    share: float = 0.01,
    rank: int = 8,
    max_probes: int = 64,
) -> LayerTraces:
    """tr(H_ii) of every layer, with as many probes as it takes (Hutchinson 1990; Meyer et al. 2021).

    E[vᵀ A v] = tr(A) for a vector v of independent random signs, with variance 2 Σ_{j≠k} A_jk². Each layer is probed
    with its own block H_ii: a product with the whole H would serve all layers at once, but its blocks off the diagonal
    add noise. The few steep directions of a network make most of the variance, so ``rank`` products find a subspace
    near them, ``rank`` more give the trace inside it exactly, and only the rest is probed, as in Hutch++.
    On the task Hessian of a small trained convolutional network (three layers, 776 weights, 200 samples) a tolerance of
    0.05 took 185 products with ``rank=0`` and 20, 21 and 36 with 4, 8 and 16.

    Stops once every layer's standard error, widened as Student's t widens an interval after so few probes, is below
    ``tolerance`` · max(|tr(H_ii)|, ``share`` · Σ_j |tr(H_jj)|). A rule that looks at the draws favours lucky ones, and
    few draws of few eigenvalues are skewed: on that network 95 % intervals held the truth in 92 to 96 % of 200 runs and
    the mean was off by less than 1 %; on networks of a hundred weights, and on single blocks of rank 1 to 40, in 85 to
    96 % of 300 to 600 runs, and by less than 2.5 %.

    Args:
        operator: The Hessian or the Gauss–Newton matrix.
        generators: A random generator a layer.
        tolerance: Largest standard error, relative to the layer's trace.
        share: Share of all traces below which a layer needs no relative accuracy of its own.
        rank: Dimensions of the subspace; it takes rank · n numbers of memory. 0 is Hutchinson's own estimator.
        max_probes: Most probes of the rest, at least 4.

    Returns:
        The traces, what they cost and which of them reached the tolerance.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.measures.hessian.hessian import Hessian
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> operator = Hessian(net, find_layers(net, x), make_objective("distill", net, [x]))
        >>> traces = estimate_layer_traces(operator, [torch.Generator().manual_seed(0)], rank=0)
        >>> traces.values, traces.probes, traces.converged  # the block is diagonal: signs give its trace exactly
        (tensor([2.5000], dtype=torch.float64), 4, tensor([True]))
    """

    def multiply(vectors: list[Tensor]) -> list[Tensor]:
        return [image.flatten() for image in operator.layer_products(operator.split(torch.cat(vectors)))]

    def draw() -> list[Tensor]:
        return [v.flatten() for v in _signs(operator, generators)]

    bases, inside = _subspaces(multiply, draw, rank)
    draws: list[list[float]] = []
    while True:
        draws.append(_outside(multiply, draw(), bases))
        if len(draws) < _LEAST_PROBES:
            continue
        means, errors = _mean_and_error(torch.tensor(draws, dtype=torch.float64))
        values = inside + means
        size = torch.maximum(values.abs(), share * values.abs().sum())
        widened = errors * float(stdtrit(len(draws) - 1, 0.975)) / 1.96
        converged = widened <= tolerance * size
        if len(draws) >= max_probes or bool(converged.all()):
            return LayerTraces(values, errors, len(draws), len(draws) + 2 * rank, converged)


Multiply = Callable[[list[Tensor]], list[Tensor]]


def _subspaces(multiply: Multiply, draw: Callable[[], list[Tensor]], rank: int) -> tuple[list[Tensor], Tensor]:
    """Of every operator an orthonormal Q near the range of its largest eigenvalues, and tr(QᵀAQ); 2 rank products."""
    if not rank:
        return [], torch.zeros((), dtype=torch.float64)
    images = [multiply(draw()) for _ in range(rank)]
    bases = [torch.linalg.qr(torch.stack(columns, dim=1)).Q for columns in zip(*images, strict=True)]
    inside = torch.zeros(len(bases), dtype=torch.float64)
    for j in range(rank):
        # An operator smaller than the subspace has fewer columns.
        columns = [q[:, j] if j < q.shape[1] else torch.zeros_like(q[:, 0]) for q in bases]
        inside += torch.tensor(_dots(columns, multiply(columns)), dtype=torch.float64)
    return bases, inside


def _outside(multiply: Multiply, vectors: list[Tensor], bases: list[Tensor]) -> list[float]:
    """(P v)ᵀ A (P v) of every operator, P = I − QQᵀ: in the mean over v the trace outside the subspace."""
    rest = [v - q @ (q.T @ v) for v, q in zip(vectors, bases, strict=True)] if bases else vectors
    return _dots(rest, multiply(rest))


def _dots(left: list[Tensor], right: list[Tensor]) -> list[float]:
    return [float(torch.dot(a.double(), b.double())) for a, b in zip(left, right, strict=True)]


def _signs(operator: LayerOperator, generators: Sequence[torch.Generator]) -> list[Tensor]:
    """Random signs for every layer, each from its own generator."""
    signs = [
        torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1)
        for size, generator in zip(operator.sizes, generators, strict=True)
    ]
    return operator.split(operator.like(torch.cat(signs)))


def _mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5
