"""Ground truth for the curvature benchmark: the Hessian of the distill objective in float64, by routes of its own.

Nothing of ``lightning_caq`` is used here, and no batch-norm is folded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights that curvature is taken by: the parameters that require a gradient, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]


def soft_cross_entropy(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy to the float network's own outputs: the distill objective up to a constant."""
    return F.cross_entropy(model(x), targets)


def gradient(model: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward pass of the network as it is: the unit that every cost is counted in."""
    return torch.autograd.grad(soft_cross_entropy(model, x, targets), weights_of(model))


class Reference:
    """The Hessian over some images, in float64.

    Args:
        model: The network in eval mode; a copy in float64 is worked on.
        x: The images.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._model, self._x = copy.deepcopy(model).double(), x.double()
        self._weights = weights_of(self._model)

    def product(self, vector: Tensor) -> Tensor:
        """H v by plain double backward, all images in one batch."""
        targets = self._model(self._x).softmax(1).detach()
        loss = soft_cross_entropy(self._model, self._x, targets)
        slopes = torch.autograd.grad(loss, self._weights, create_graph=True)
        parts = vector.double().split([w.numel() for w in self._weights])
        inner = sum((g.flatten() * v).sum() for g, v in zip(slopes, parts, strict=True))
        return _flat(torch.autograd.grad(inner, self._weights))

    def eigenvalues(self, negligible: float = 1e-11) -> Tensor:
        """Every non-zero eigenvalue, largest first, from one backward pass for each output of each image.

        At the float weights H = Jᵀ diag(S_1 … S_N) J / N with S = diag(p) − p pᵀ, so its eigenvalues are those of the
        inner products of the rows √(p_c / N) (∇z_c − Σ p_c' ∇z_c').

        Args:
            negligible: Rows with less than this share of the trace of S are left out.
        """
        with torch.no_grad():
            p = self._model(self._x).softmax(1)
        shares = p * (1 - 2 * p + p.square().sum(1, keepdim=True))
        kept = shares > negligible * shares.sum()
        matrix = p.new_empty(int(kept.sum()), sum(w.numel() for w in self._weights))
        row = 0
        for n, image in enumerate(self._x):
            z = self._model(image[None])[0]
            for c in kept[n].nonzero().flatten().tolist():
                distance = (z[c] - (p[n] * z).sum()) * (p[n, c] / len(self._x)).sqrt()
                matrix[row] = _flat(torch.autograd.grad(distance, self._weights, retain_graph=True))
                row += 1
        return torch.linalg.eigvalsh(matrix @ matrix.T).flip(0)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def relative_errors(values: Tensor, truth: Tensor) -> Tensor:
    """Of the leading eigenvalues, |λ − truth| / |truth|, place by place.

    Example:
        >>> relative_errors(torch.tensor([2.0, 1.1]), torch.tensor([2.0, 1.0, 0.5])).round(decimals=3).tolist()
        [0.0, 0.1]
    """
    count = min(len(values), len(truth))
    return (values[:count].double() - truth[:count]).abs() / truth[:count].abs()
