"""Cost: about how long measuring will take, told before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.weight_rows import pair_work
from lightning_caq.measures.rounding.channel_groups import MOST_GROUPS
from lightning_caq.network.batches import batch_size
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective

OF_SPECTRUM = frozenset({"subspace", "trace", "density", "loss_change", "channel_groups", "top_eigenvalue"})
OF_ROWS = OF_SPECTRUM | {"diagonal", "gradient_norm"}
_BLOCK_SAMPLES = 256
_MATRIX = 512


def estimate_seconds(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    needs: frozenset[str],
    *,
    bits: int,
    eigenpairs: int,
    tolerance: float = 1e-5,
    max_rows: int = 2048,
) -> float:
    """About how many seconds the measures take; costs two gradients of the first batch and one forward pass of all.

    Args:
        model: The network, in eval mode.
        layers: The layers.
        target: The objective.
        needs: The measures.
        bits: Number of bit-widths.
        eigenpairs: Number of eigenpairs.
        tolerance: As in ``gram_spectrum``.
        max_rows: As in ``gram_spectrum``.

    Returns:
        Seconds. On a ResNet-20 and 256 samples they were within a factor of two of the time that measuring then took.
    """
    rows = 0
    if target.name == "distill" and needs & OF_ROWS:
        rows = len(choose_rows(model, target.batches, tolerance, max_rows).rows)
    gradients = gradients_needed(
        needs,
        target.name,
        len(layers),
        bits,
        eigenpairs,
        samples=target.samples,
        first=batch_size(target.batches[0]),
        rows=rows,
    )
    seconds = gradients * _gradient_seconds(model, layers, target)
    if rows and needs & OF_SPECTRUM:
        work = sum(pair_work(layer, max(layer.macs // layer.weights, 1)) for layer in layers)
        # Half as much again for what is not a product; an eigendecomposition is about 25 products of its matrices.
        seconds += (1.5 * rows**2 * work + 25 * rows**3) * _multiplication_seconds()
    return seconds


def gradients_needed(
    needs: frozenset[str],
    objective: str,
    layers: int,
    bits: int,
    eigenpairs: int,
    *,
    samples: int,
    first: int,
    rows: int = 0,
) -> float:
    """About how many gradients over the same samples the measures cost, from counts of passes on a ResNet-20.

    Args:
        needs: The measures.
        objective: ``"distill"`` or ``"task"``.
        layers: Number of layers.
        bits: Number of bit-widths.
        eigenpairs: Number of eigenpairs.
        samples: Number of samples.
        first: Samples of the first batch, which κ and its kin are measured on.
        rows: For ``distill``, output rows whose gradients are taken.

    Returns:
        The number, without the products of rows with each other.

    Example:
        >>> gradients_needed(frozenset({"loss_change", "gradient_norm"}), "task", 20, 6, 10, samples=256, first=128)
        301.0
    """
    distill = objective == "distill"
    block = min(first, _BLOCK_SAMPLES) / samples
    of_rows = 1.5 * rows / samples  # a row is a gradient of one sample, and what putting it away takes
    costs = {
        "kappa": 22.0 * block,
        "kappa_mean": 36.0 * block,
        "local_lipschitz": 26.0 * block,
        # These work on as many samples whatever there are: one, the first few, 40 times 32 for each choice of bits.
        "lipschitz": 330 / samples,
        "lipschitz_amplification": 960 / samples,
        "scale_importance": 1280 * (bits + 1) / samples,
        "inputs": 0.2 * layers,
        "output_error": 0.2 * layers + 0.3 * bits,
        "amplification": 10.0,
        "kl": 0.35 * layers * bits,
        "activation_cost": 0.2 * layers * bits,
        # Lanczos takes 2.4 products an eigenpair, each of two gradients.
        "subspace": of_rows if distill else 5.0 * eigenpairs + 12.0 * layers,
        "loss_change": 0.5 * layers,
        "diagonal": of_rows if distill else 4.0,
        "gradient_norm": 1.0 + of_rows,
        "top_eigenvalue": of_rows if distill else 20.0 * layers,
        # Known with the subspace where that holds every eigenvalue.
        "density": 0.0 if distill else 256.0,
    }
    asked = set(needs)
    if asked & {"trace", "density", "loss_change", "channel_groups"}:
        asked.add("subspace")
    if "channel_groups" in asked:  # groups are told apart by the diagonal, and each is tried alone
        asked.add("diagonal")
        costs["loss_change"] *= 1 + MOST_GROUPS
    if "kappa_mean" in asked:
        asked.add("kappa")
    return sum(cost for name, cost in costs.items() if name in asked)


def _gradient_seconds(model: nn.Module, layers: Sequence[Layer], target: Objective) -> float:
    """Seconds of one gradient over all samples, judged by the second one of the first batch."""
    weights = [layer_weight(model, layer) for layer in layers]
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(target.batch_loss(model, 0), weights, allow_unused=True)
        _wait(weights[0].device)
        seconds = time.perf_counter() - start
    return seconds * target.samples / batch_size(target.batches[0])


def _multiplication_seconds() -> float:
    """Seconds of one multiplication in a product of matrices on the CPU, where rows are held."""
    matrix = torch.ones(_MATRIX, _MATRIX)
    for _ in range(2):
        start = time.perf_counter()
        _ = matrix @ matrix
        seconds = time.perf_counter() - start
    return seconds / _MATRIX**3


def _wait(device: torch.device) -> None:
    """Until an accelerator, which works on its own, is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
