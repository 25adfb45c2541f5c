"""What the Hessian and the Gauss–Newton matrix share: the layout of vectors, graphs that are kept, and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from lightning_caq.measures.hessian.graph_memory import graph_bytes
from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.utilities.sharing import Sharing

Graph = TypeVar("Graph")


class CurvatureOperator(ABC, Generic[Graph]):
    """A symmetric matrix over the weights of the layers, known by its products; a sum over batches.

    Args:
        model: The network, in eval mode.
        layers: The layers whose weights are the variables; in this order they make up a vector of n numbers.
        batches: The samples; batches are weighted by their sizes.
        graph_memory: Bytes that graphs may take together.
        sharing: Who divides the batches.

    Attributes:
        sizes: Number of weights of each layer, n_i.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], graph_memory: int, sharing: Sharing
    ) -> None:
        self._model, self._batches, self._room, self._sharing = model, batches, graph_memory, sharing
        self._weights = [layer_weight(model, layer) for layer in layers]
        self._kept: dict[int, Graph] = {}
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

    @abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """The matrix times a vector, shape (n,)."""

    @abstractmethod
    def layer_products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The block of every layer times that layer's vector, each on the part of the graph behind its own weight."""

    def layer_quadratics(self, vectors: Sequence[Tensor]) -> list[float]:
        """v_iᵀ H_ii v_i of every layer."""
        products = self.layer_products(vectors)
        return [float((p.double() * v.double()).sum()) for p, v in zip(products, vectors, strict=True)]

    def _graphs(self) -> Iterator[tuple[float, Graph, bool]]:
        """Of every batch of this rank its share, its graph, and whether that graph is kept."""
        sizes = [batch_size(batch) for batch in self._batches]
        for index in self._sharing.mine(range(len(self._batches))):
            if index not in self._kept and self._room > 0:
                self._room -= graph_bytes(partial(self._build, index), self._model, self._batches)
                if self._room >= 0:
                    self._kept[index] = self._build(index)
            kept = index in self._kept
            yield sizes[index] / sum(sizes), self._kept[index] if kept else self._build(index), kept

    @abstractmethod
    def _build(self, index: int) -> Graph:
        """What products on one batch are taken on."""


def in_parts(batches: Sequence[Any], ranks: int) -> Sequence[Any]:
    """Batches, each cut into as many parts as there are ranks where batches are fewer than these.

    Example:
        >>> import torch
        >>> [len(part) for part in in_parts([torch.zeros(5)], ranks=2)]
        [2, 3]
    """
    if len(batches) >= ranks:
        return batches
    parts = []
    for batch in batches:
        cuts = [batch_size(batch) * rank // ranks for rank in range(ranks + 1)]
        for start, stop in pairwise(cuts):
            parts += take_samples([batch], stop - start, skip=start)
    return parts
