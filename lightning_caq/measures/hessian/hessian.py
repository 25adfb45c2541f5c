"""The Hessian of the objective as an operator: products with vectors, for the whole network or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_caq.measures.hessian.convolutions import SeparateConvolutions
from lightning_caq.measures.hessian.operator import CurvatureOperator, in_parts
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective, make_objective
from lightning_caq.utilities.sharing import ALONE, Sharing

Gradients = tuple[Tensor, ...]


class Hessian(CurvatureOperator[Gradients]):
    """∇²ℓ(w) over the weights of the layers, by double backward (Pearlmutter 1994).

    The gradient's graph of a batch is kept from one product to the next as long as all that are kept fit in
    ``graph_memory``; a product then costs two gradients instead of three. Batches beyond that are built anew each time.
    Several processes divide the batches among them, and all get the sum over all batches; if there are fewer batches
    than processes, batches are cut, and a loss then has to be a mean over samples.

    Args:
        model: The network, in eval mode.
        layers: The layers whose weights are the variables; in this order they make up a vector of n numbers.
        objective: The objective ℓ; batches are weighted by their sizes.
        graph_memory: Bytes that graphs may take together.
        sharing: Who divides the batches.

    Attributes:
        sizes: Number of weights of each layer, n_i.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> from lightning_caq.network.objective import make_objective
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> operator = Hessian(net, find_layers(net, x), make_objective("distill", net, [x]))
        >>> operator.product(torch.tensor([1.0, 1.0]))  # E[x xᵀ] of a linear model under squared error
        tensor([0.5000, 2.0000])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        objective: Objective,
        *,
        graph_memory: int = 2**30,
        sharing: Sharing = ALONE,
    ) -> None:
        self._objective = objective
        if len(objective.batches) < sharing.size:
            parts = in_parts(objective.batches, sharing.size)
            self._objective = make_objective(objective.name, model, parts, objective.loss)
        super().__init__(model, layers, self._objective.batches, graph_memory, sharing)

    def product(self, vector: Tensor) -> Tensor:
        """H v, shape (n,)."""
        parts = self.split(vector)
        total = torch.zeros_like(vector)
        for share, gradients, kept in self._graphs():
            images = torch.autograd.grad(
                gradients, self._weights, parts, retain_graph=kept, allow_unused=True, materialize_grads=True
            )
            total.add_(torch.cat([image.flatten() for image in images]), alpha=share)
        return self._sharing.sum(total, "Hessian product")

    def layer_products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H_ii v_i of every layer, each on the part of the graph behind its own weight."""
        total = self.like(torch.zeros(self.size))
        parts = self.split(total)
        for share, gradients, _ in self._graphs():
            for part, gradient, weight, v in zip(parts, gradients, self._weights, vectors, strict=True):
                (image,) = torch.autograd.grad(
                    gradient, weight, v, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                part.add_(image, alpha=share)
        self._sharing.sum(total, "layers' Hessian products")
        return parts

    def gradient(self) -> list[Tensor]:
        """∇ℓ, one tensor a layer."""
        total = self.like(torch.zeros(self.size))
        parts = self.split(total)
        for share, gradients, _ in self._graphs():
            for part, gradient in zip(parts, gradients, strict=True):
                part.add_(gradient.detach(), alpha=share)
        self._sharing.sum(total, "gradient")
        return parts

    def _build(self, index: int) -> Gradients:
        with torch.enable_grad(), SeparateConvolutions():
            loss = self._objective.batch_loss(self._model, index)
            return torch.autograd.grad(
                loss, self._weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
