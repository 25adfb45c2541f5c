"""Cost: about how long measuring will take, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.pieces import pair_work
from lightning_caq.measures.gram.spectrum import affordable_rows, rows_memory
from lightning_caq.network.batches import batch_size
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective

BLOCK_SAMPLES = 32  # samples of the first batch that measures of single layers look at
_ROW_GRADIENTS = 2.3  # a row is a gradient of one sample, and what putting it away takes
_MATRIX = 512


@dataclass(frozen=True)
class Extent:
    """How much there is to measure.

    Attributes:
        objective: ``"distill"`` or ``"task"``.
        layers: Number of layers.
        bits: Number of bit-widths.
        eigenpairs: Number of eigenpairs.
        samples: Number of samples.
        first: Samples of the first batch.
        needs: Names of the measures that are taken, with those that they need.
        weights: Number of weights of all layers.
    """

    objective: str
    layers: int
    bits: int
    eigenpairs: int
    samples: int
    first: int
    needs: frozenset[str] = frozenset()
    weights: int = 0

    @property
    def distill(self) -> bool:
        """Whether the objective is ``"distill"``, whose curvature comes from gradients of output rows."""
        return self.objective == "distill"

    @property
    def block_samples(self) -> int:
        """Samples that measures of single layers look at, at most."""
        return min(self.first, BLOCK_SAMPLES)

    @property
    def block(self) -> float:
        """The part that these are of all samples."""
        return self.block_samples / self.samples


@dataclass(frozen=True)
class Cost:
    """What a measure costs, from counts of passes on a ResNet-20.

    Attributes:
        gradients: Gradients over all samples, forward and backward pass.
        row_passes: How often the gradient of every output row is taken beside them.
        row_products: Whether these rows are multiplied with each other.
        seconds: What takes no gradients.

    Example:
        >>> Cost(1.0, row_passes=1) + Cost(0.5, row_products=True)
        Cost(gradients=1.5, row_passes=1, row_products=True, seconds=0.0)
    """

    gradients: float = 0.0
    row_passes: int = 0
    row_products: bool = False
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gradients + other.gradients,
            self.row_passes + other.row_passes,
            self.row_products or other.row_products,
            self.seconds + other.seconds,
        )


def estimate_seconds(
    model: nn.Module,
    layers: Sequence[Layer],
    target: Objective,
    cost: Cost,
    *,
    tolerance: float = 1e-5,
    eigenpairs: int = 64,
) -> float:
    """About how many seconds a cost is; takes two gradients of the first batch and one forward pass of all.

    Args:
        model: The network, in eval mode.
        layers: The layers.
        target: The objective.
        cost: What measures cost together.
        tolerance: As in ``gram_spectrum``.
        eigenpairs: Number of eigenpairs.

    Returns:
        Seconds. On a ResNet-20 and 256 samples they were within a factor of two of the time that measuring then took.
    """
    rows = 0
    if cost.row_passes:
        most, draws = affordable_rows(target.samples, eigenpairs)
        rows = len(choose_rows(model, target.batches, tolerance, most, draws=draws).rows)
    gradients = cost.gradients + cost.row_passes * _ROW_GRADIENTS * rows / target.samples
    seconds = cost.seconds + gradients * _gradient_seconds(model, layers, target)
    if cost.row_products:
        work = sum(pair_work(layer, max(layer.macs // layer.weights, 1)) for layer in layers)
        # Rows that do not fit in memory are folded.
        work = min(work, rows_memory(layer_weight(model, layers[0])) // (16 * rows))
        # Half as much again for what is not a product; an eigendecomposition is about 25 products of its matrices.
        seconds += (1.5 * rows**2 * work + 25 * rows**3) * multiplication_seconds()
    return seconds


def _gradient_seconds(model: nn.Module, layers: Sequence[Layer], target: Objective) -> float:
    """Seconds of one gradient over all samples, judged by the second one of the first batch."""
    weights = [layer_weight(model, layer) for layer in layers]
    for _ in range(2):
        start = time.perf_counter()
        torch.autograd.grad(target.batch_loss(model, 0), weights, allow_unused=True)
        _wait(weights[0].device)
        seconds = time.perf_counter() - start
    return seconds * target.samples / batch_size(target.batches[0])


def multiplication_seconds() -> float:
    """Seconds of one multiplication in a product of matrices on the CPU, where rows are kept."""
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
