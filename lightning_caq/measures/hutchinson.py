"""Hutchinson: traces from products with random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_caq.measures.hessian import Hessian


def layer_traces(operator: Hessian, probes: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """tr(H_ii) of every layer and its standard error (Hutchinson 1990).

    E[vᵀ A v] = tr(A) for a vector v of independent random signs. Each layer is probed with its own block H_ii: a
    product with the whole H would serve all layers at once, but its blocks off the diagonal add noise.

    Args:
        operator: The Hessian.
        probes: Number of probes, at least 2, else there is no standard error.
        generators: A random generator a layer.

    Returns:
        Traces and standard errors, shape (layers,), float64, nat/weight².
    """
    draws = []
    for _ in range(probes):
        signs = [
            torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1)
            for size, generator in zip(operator.sizes, generators, strict=True)
        ]
        vectors = operator.split(operator.like(torch.cat(signs)))
        draws.append(operator.layer_quadratics(vectors))
    values = torch.tensor(draws, dtype=torch.float64)
    return values.mean(0), values.std(0) / probes**0.5
