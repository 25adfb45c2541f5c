"""Leading pairs: the eigenpairs of the Hessian that span the short-axis subspace S, and the curvature outside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_caq.measures.hessian.folding import batchnorm_folded
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.lanczos import Eigenpairs, lanczos
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.utilities.seeding import generator
from lightning_caq.utilities.sharing import ALONE, Sharing


@contextmanager
def folded_hessian(
    model: nn.Module, layers: Sequence[Layer], objective: Objective, *, sharing: Sharing = ALONE
) -> Iterator[Hessian]:
    """The Hessian of the objective, with batch-norms folded into the layers before them while it is in use.

    Args:
        model: The float network, in eval mode, its layers' weights requiring gradients.
        layers: The layers whose weights are the variables.
        objective: The objective.
        sharing: Who divides the batches.
    """
    with batchnorm_folded(model, layers, objective.batches[0]):
        yield Hessian(model, layers, objective, sharing=sharing)


def leading_pairs(hessian: Hessian, k: int, seed: int) -> Eigenpairs:
    """The ``k`` eigenpairs of largest magnitude, or all where there are fewer, by Lanczos (CET §3.3).

    Args:
        hessian: The Hessian, of n weights.
        k: Number of pairs.
        seed: Seed of the starting vector; the same seed gives the same pairs.

    Returns:
        The pairs, vectors of shape (n, min(k, n)).

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layer = Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> with folded_hessian(net, [layer], make_objective("distill", net, [x])) as hessian:
        ...     [round(value, 4) for value in leading_pairs(hessian, k=64, seed=0).values.tolist()]
        [2.0, 0.5]
    """
    start = hessian.like(torch.randn(hessian.size, generator=generator(seed, "lanczos")))
    return lanczos(hessian.product, start, min(k, hessian.size))


def residual_curvature(trace: float, values: Tensor, size: int) -> float:
    """μ, the mean curvature outside S, floored at 0; nat/weight².

    Args:
        trace: tr(H).
        values: λ_1, …, λ_k of the pairs that span S, shape (k,).
        size: Number of weights, n.

    Example:
        >>> values = torch.tensor([5.0, 3.0])
        >>> residual_curvature(10.0, values, size=6), residual_curvature(7.0, values, size=6)
        (0.5, 0.0)
    """
    return max(trace - float(values.sum()), 0.0) / max(size - len(values), 1)
