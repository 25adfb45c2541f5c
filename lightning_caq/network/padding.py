"""Padding: positions of a batch that only fill it up, which tell nothing of what reaches a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_caq.network.forward import Batch


def padding_of(batch: Any) -> Tensor | None:
    """Which positions of a batch count, shape (samples, positions), bool; ``None`` where all do, as far as is known."""
    return batch.padding if isinstance(batch, Batch) else None


def has_positions(module: nn.Module, tensor: Tensor, keep: Tensor | None) -> bool:
    """Whether a module takes vectors, one for each of the positions.

    Example:
        >>> import torch
        >>> keep = torch.tensor([[True, False]])
        >>> [has_positions(module, torch.zeros(1, 2, 3), keep) for module in (nn.Linear(3, 3), nn.ReLU())]
        [True, False]
    """
    return keep is not None and isinstance(module, nn.Linear) and tensor.ndim == 3 and tensor.shape[:2] == keep.shape


def without_padding(module: nn.Module, tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The vectors at positions that count, shape (positions, numbers); other tensors as they are.

    Example:
        >>> import torch
        >>> without_padding(nn.Linear(3, 3), torch.ones(1, 2, 3), torch.tensor([[True, False]])).shape
        torch.Size([1, 3])
    """
    if keep is None or not has_positions(module, tensor, keep):
        return tensor
    return tensor[keep.to(tensor.device)]


def padding_zeroed(module: nn.Module, tensor: Tensor, keep: Tensor | None) -> Tensor:
    """The tensor with zeros at positions that do not count, where norms and sums do not see them.

    Example:
        >>> import torch
        >>> padding_zeroed(nn.Linear(1, 1), torch.ones(1, 2, 1), torch.tensor([[True, False]])).flatten()
        tensor([1., 0.])
    """
    if keep is None or not has_positions(module, tensor, keep):
        return tensor
    return tensor * keep.to(tensor)[:, :, None]
