"""Cost: about how long measuring will take, told before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from lightning_caq.batches import batch_size
from lightning_caq.layers import Layer, layer_weight
from lightning_caq.objective import Objective


def gradient_seconds(model: nn.Module, layers: Sequence[Layer], target: Objective) -> float:
    """Seconds of one gradient over all samples, judged by the first batch."""
    weights = [layer_weight(model, layer) for layer in layers]
    start = time.perf_counter()
    torch.autograd.grad(target.batch_loss(model, 0), weights, allow_unused=True)
    return (time.perf_counter() - start) * target.samples / batch_size(target.batches[0])


def gradients_needed(needs: frozenset[str], objective: str, layers: int, bits: int, eigenpairs: int) -> float:
    """About how many gradients over the same samples the measures cost, from counts of passes on a ResNet-20.

    What works on a few samples only (κ, L) is left out.

    Example:
        >>> gradients_needed(frozenset({"amplification"}), "distill", layers=20, bits=6, eigenpairs=64)
        10.0
    """
    distill = objective == "distill"
    # The Gram route takes about a gradient for each of two rows a sample, and as long again for the Gram matrices;
    # Lanczos takes 2.4 products an eigenpair, each of two gradients.
    spectrum = 8.0 if distill else 5.0 * eigenpairs + 12.0 * layers
    costs = {
        "subspace": spectrum,
        "loss_change": 0.7 * layers,
        "amplification": 0.5 * layers,
        "output_error": 0.3 * bits,
        "inputs": 0.3,
        "diagonal": 4.0,
        "gradient_norm": 1.0,
        "top_eigenvalue": 8.0 if distill else 20.0 * layers,
    }
    asked = set(needs)
    if asked & {"trace", "loss_change"}:
        asked.add("subspace")
    return sum(cost for name, cost in costs.items() if name in asked)
