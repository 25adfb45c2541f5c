"""The Gauss–Newton matrix of any loss of the outputs as an operator: Jᵀ ∇²ℓ(z) J, without second derivatives of z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError
from lightning_caq.measures.hessian.convolutions import SeparateConvolutions
from lightning_caq.measures.hessian.operator import CurvatureOperator, in_parts
from lightning_caq.network.forward import Batch, run_model
from lightning_caq.network.layers import Layer
from lightning_caq.network.outputs import Outputs, divergence
from lightning_caq.utilities.sharing import ALONE, Sharing

OutputLoss = Callable[[Tensor, Any], Tensor]
"""A loss of outputs, shape (samples, numbers), for a batch: the mean over its samples."""


@dataclass(frozen=True)
class _Graph:
    """What products on one batch are taken on.

    Attributes:
        outputs: z, with its graph to the weights.
        direction: u, what Jᵀ is applied to.
        pulled: Jᵀ u of every layer, with its graph to u.
        point: z again, cut off from the network.
        slope: ∇ℓ(z), with its graph to ``point``.
    """

    outputs: Tensor
    direction: Tensor
    pulled: tuple[Tensor, ...]
    point: Tensor
    slope: Tensor


class GaussNewton(CurvatureOperator[_Graph]):
    """G = Σ_b N_b/N · J_bᵀ ∇²ℓ_b(z_b) J_b over the weights of the layers, z_b the outputs for batch b.

    The part of the Hessian of ℓ(z(w)) that is left if the network is taken to be linear in its weights (Schraudolph
    2002). No term of it is negative where ℓ is convex in z, as cross-entropy and the squared error are. For ``distill``
    at the float weights it is the Hessian itself. J v is the derivative of u ↦ Jᵀ u, so whatever the network is made
    of, two backward passes suffice.

    The graphs of a batch are kept from one product to the next as long as all that are kept fit in ``graph_memory``;
    batches beyond that are built anew each time. On a ResNet-20 with its batch-norms folded and a batch of 128, a
    product cost 1.9 gradients (3.0 with graphs built anew, 2.0 for ``Hessian``), the products with all 20 layers'
    blocks 6.7.

    Args:
        model: The network, in eval mode.
        layers: The layers whose weights are the variables; in this order they make up a vector of n numbers.
        batches: The samples; batches are weighted by their sizes.
        output_loss: Loss of the outputs for a batch, and of that batch, where labels may be: the mean over samples. By
            default the divergence from these outputs, whose Hessian at them is that of the ``distill`` objective.
        graph_memory: Bytes that graphs may take together.
        sharing: Who divides the batches; with fewer batches than processes these are cut.

    Attributes:
        sizes: Number of weights of each layer, n_i.

    Example:
        >>> from lightning_caq.network.layers import find_layers
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> operator = GaussNewton(net, find_layers(net, x), [x], lambda z, batch: z.square().mean())
        >>> operator.product(torch.tensor([1.0, 1.0]))  # 2 E[x xᵀ]
        tensor([1., 4.])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        batches: Sequence[Any],
        output_loss: OutputLoss | None = None,
        *,
        graph_memory: int = 2**30,
        sharing: Sharing = ALONE,
    ) -> None:
        super().__init__(model, layers, in_parts(batches, sharing.size), graph_memory, sharing)
        self._loss = output_loss

    def product(self, vector: Tensor) -> Tensor:
        """G v, shape (n,)."""
        parts, total = self.split(vector), torch.zeros_like(vector)
        for share, graph, _ in self._graphs():
            images = _product(graph, range(len(parts)), parts, self._weights)
            total.add_(torch.cat([image.flatten() for image in images]), alpha=share)
        return self._sharing.sum(total, "Gauss–Newton product")

    def layer_products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G_ii v_i of every layer, each on the part of the graph behind its own weight."""
        total = self.like(torch.zeros(self.size))
        parts = self.split(total)
        for share, graph, _ in self._graphs():
            for i, (part, weight, v) in enumerate(zip(parts, self._weights, vectors, strict=True)):
                part.add_(_product(graph, [i], [v], [weight])[0], alpha=share)
        self._sharing.sum(total, "layers' Gauss–Newton products")
        return parts

    def _build(self, index: int) -> _Graph:
        batch = self._batches[index]
        with torch.enable_grad(), SeparateConvolutions():
            meant = run_model(self._model, batch)
            outputs = meant.values
            direction = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, self._weights, direction, create_graph=True, allow_unused=True, materialize_grads=True
            )
            point = outputs.detach().requires_grad_()
            loss = self._output_loss(meant, point, batch)
            if loss.numel() != 1 or not bool(torch.isfinite(loss).all()):
                raise CalibrationError(
                    f"The loss of the outputs for batch {index} must be one finite number, got {loss}."
                )
            (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        return _Graph(outputs, direction, pulled, point, slope)

    def _output_loss(self, meant: Outputs, point: Tensor, batch: Any) -> Tensor:
        if self._loss is None:
            return divergence(meant.with_values(meant.values.detach()), meant.with_values(point))
        return self._loss(point, batch.data if isinstance(batch, Batch) else batch)


def _product(
    graph: _Graph, places: Sequence[int], vectors: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The product with the blocks of some layers, their common ones too."""
    if not graph.slope.requires_grad:  # a loss that is linear in the outputs has no curvature
        return tuple(torch.zeros_like(w, requires_grad=False) for w in weights)
    pulled = [graph.pulled[i] for i in places]
    (pushed,) = torch.autograd.grad(  # J v
        pulled, graph.direction, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    (bent,) = torch.autograd.grad(graph.slope, graph.point, pushed, retain_graph=True)
    return torch.autograd.grad(
        graph.outputs, weights, bent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
