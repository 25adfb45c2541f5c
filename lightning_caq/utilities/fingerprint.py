"""Fingerprints: a short text that tells whether two sets of weights are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values, independent of device, memory format and floating-point container.

    Example:
        >>> a = {"w": torch.ones(2, 2)}
        >>> fingerprint(a) == fingerprint({"w": torch.ones(2, 2, dtype=torch.float64)})
        True
        >>> fingerprint(a) == fingerprint({"w": torch.zeros(2, 2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
