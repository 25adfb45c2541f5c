"""Graph memory: how much room the graph of a computation takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.utilities.structures import tensors


def graph_bytes(build: Callable[[], Any], model: nn.Module, batches: Any) -> int:
    """Bytes of what a graph saves, each storage once; from a graph that is thrown away.

    Args:
        build: Builds the graph.
        model: The network; its parameters are there anyway and do not count.
        batches: The samples, which do not count either; batches may be views of one large tensor.

    Example:
        >>> x = torch.ones(100, requires_grad=True)
        >>> graph_bytes(lambda: x.exp(), nn.Identity(), [])  # its result is saved: 100 numbers of 4 bytes
        400
    """
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        build()
    there = (*model.parameters(), *tensors(batches))
    present = {t.untyped_storage().data_ptr() for t in there}
    return sum(size for pointer, size in seen.items() if pointer not in present)
