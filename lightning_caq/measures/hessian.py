"""The Hessian of the objective as an operator: products with vectors, for the whole network or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_caq.layers import Layer, layer_weight
from lightning_caq.objective import Objective


class Hessian:
    """∇²ℓ(w) over the weights of the layers, by double backward (Pearlmutter 1994).

    Args:
        model: The network, in eval mode.
        layers: The layers whose weights are the variables; in this order they make up a vector of n numbers.
        objective: The objective ℓ; batches are weighted by their sizes.

    Example:
        >>> from lightning_caq.layers import find_layers
        >>> from lightning_caq.objective import make_objective
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> operator = Hessian(net, find_layers(net, x), make_objective("distill", net, [x]))
        >>> operator.product(torch.tensor([1.0, 1.0]))  # E[x xᵀ] of a linear model under squared error
        tensor([0.5000, 2.0000])
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._weights = [layer_weight(model, layer) for layer in layers]
        self.sizes = [w.numel() for w in self._weights]

    @property
    def size(self) -> int:
        """Number of weights, n."""
        return sum(self.sizes)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector of n numbers as one tensor a layer, in the shapes of the weights."""
        return [v.reshape(w.shape) for v, w in zip(vector.split(self.sizes), self._weights, strict=True)]

    def like(self, vector: Tensor) -> Tensor:
        """A vector in the dtype and on the device of the weights."""
        return vector.to(self._weights[0])

    def product(self, vector: Tensor) -> Tensor:
        """H v, shape (n,)."""
        parts = self.split(vector)
        total = torch.zeros_like(vector)
        for share, gradients in self._gradients():
            images = torch.autograd.grad(
                gradients, self._weights, grad_outputs=parts, allow_unused=True, materialize_grads=True
            )
            total += share * torch.cat([image.flatten() for image in images])
        return total

    def layer_quadratics(self, vectors: Sequence[Tensor]) -> list[float]:
        """v_iᵀ H_ii v_i of every layer, from per-layer products on one graph a batch."""
        sums = [0.0] * len(self._weights)
        for share, gradients in self._gradients():
            for i, (gradient, weight, v) in enumerate(zip(gradients, self._weights, vectors, strict=True)):
                (image,) = torch.autograd.grad(
                    gradient, weight, grad_outputs=v, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                sums[i] += share * float((image.double() * v.double()).sum())
        return sums

    def gradient(self) -> list[Tensor]:
        """∇ℓ, one tensor a layer."""
        total = [torch.zeros_like(w) for w in self._weights]
        for share, gradients in self._gradients(create_graph=False):
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += share * gradient
        return total

    def _gradients(self, create_graph: bool = True) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        for index in range(len(self._objective.batches)):
            with torch.enable_grad():
                loss = self._objective.batch_loss(self._model, index)
                gradients = torch.autograd.grad(
                    loss, self._weights, create_graph=create_graph, allow_unused=True, materialize_grads=True
                )
            yield self._objective.weight(index), gradients
