"""The Hessian of the objective as an operator: products with vectors, for the whole network or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_caq.batches import batch_size, take_samples
from lightning_caq.layers import Layer, layer_weight
from lightning_caq.measures.convolutions import SeparateConvolutions
from lightning_caq.measures.graph_memory import graph_bytes
from lightning_caq.measures.sharing import ALONE, Sharing
from lightning_caq.objective import Objective, make_objective

Gradients = tuple[Tensor, ...]


class Hessian:
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
        >>> from lightning_caq.layers import find_layers
        >>> from lightning_caq.objective import make_objective
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
        self._model, self._objective, self._room = model, _in_parts(objective, model, sharing.size), graph_memory
        self._sharing = sharing
        self._weights = [layer_weight(model, layer) for layer in layers]
        self._kept: dict[int, Gradients] = {}
        self.sizes = [w.numel() for w in self._weights]

    @property
    def size(self) -> int:
        """Number of weights, n."""
        return sum(self.sizes)

    @property
    def kept(self) -> int:
        """Number of batches whose graphs are kept."""
        return len(self._kept)

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
        for share, gradients, kept in self._gradients():
            images = torch.autograd.grad(
                gradients, self._weights, parts, retain_graph=kept, allow_unused=True, materialize_grads=True
            )
            total.add_(torch.cat([image.flatten() for image in images]), alpha=share)
        return self._sharing.sum(total, "Hessian product")

    def layer_products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H_ii v_i of every layer, each on the part of the graph behind its own weight."""
        total = self.like(torch.zeros(self.size))
        parts = self.split(total)
        for share, gradients, _ in self._gradients():
            for part, gradient, weight, v in zip(parts, gradients, self._weights, vectors, strict=True):
                (image,) = torch.autograd.grad(
                    gradient, weight, v, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                part.add_(image, alpha=share)
        self._sharing.sum(total, "layers' Hessian products")
        return parts

    def layer_quadratics(self, vectors: Sequence[Tensor]) -> list[float]:
        """v_iᵀ H_ii v_i of every layer."""
        products = self.layer_products(vectors)
        return [float((p.double() * v.double()).sum()) for p, v in zip(products, vectors, strict=True)]

    def gradient(self) -> list[Tensor]:
        """∇ℓ, one tensor a layer."""
        total = self.like(torch.zeros(self.size))
        parts = self.split(total)
        for share, gradients, _ in self._gradients():
            for part, gradient in zip(parts, gradients, strict=True):
                part.add_(gradient.detach(), alpha=share)
        self._sharing.sum(total, "gradient")
        return parts

    def _gradients(self) -> Iterator[tuple[float, Gradients, bool]]:
        """Of every batch of this rank its share, its gradients with their graph, and whether that graph is kept."""
        for index in self._sharing.mine(range(len(self._objective.batches))):
            if index not in self._kept and self._room > 0:
                self._room -= graph_bytes(partial(self._build, index), self._model, self._objective.batches)
                if self._room >= 0:
                    self._kept[index] = self._build(index)
            kept = index in self._kept
            yield self._objective.weight(index), self._kept[index] if kept else self._build(index), kept

    def _build(self, index: int) -> Gradients:
        with torch.enable_grad(), SeparateConvolutions():
            loss = self._objective.batch_loss(self._model, index)
            return torch.autograd.grad(
                loss, self._weights, create_graph=True, allow_unused=True, materialize_grads=True
            )


def _in_parts(objective: Objective, model: nn.Module, ranks: int) -> Objective:
    """The objective with every batch cut into as many parts as there are ranks, where batches are fewer than these."""
    if len(objective.batches) >= ranks:
        return objective
    parts = []
    for batch in objective.batches:
        cuts = [batch_size(batch) * rank // ranks for rank in range(ranks + 1)]
        for start, stop in pairwise(cuts):
            parts += take_samples([batch], stop - start, skip=start)
    return make_objective(objective.name, model, parts, objective.loss)
