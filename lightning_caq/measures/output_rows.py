"""Output rows: which outputs and classes of which samples make up the rows of A, where H = AᵀA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_caq.batches import batch_size, run_model
from lightning_caq.objective import output_rows


@dataclass(frozen=True)
class OutputRow:
    """One row of A: an output of one sample, and the class it belongs to.

    Attributes:
        batch: Index of the batch.
        sample: Index of the sample in the batch.
        position: Index of the output row in the sample; 0 unless a sample has several, as tokens or pixels.
        cls: Class c.
        weight: p_c / N, the square of the row's factor.
    """

    batch: int
    sample: int
    position: int
    cls: int
    weight: float


def choose_rows(
    model: nn.Module, batches: Sequence[Any], tolerance: float, max_rows: int
) -> tuple[list[OutputRow], float]:
    """The rows of A worth computing, heaviest first to be kept, in the order of the batches.

    A row's weight is its share of the trace of the output Hessian, p_c ‖e_c − p‖² / N: a class without probability, or
    one that has it all, adds nothing.

    Returns:
        The rows, and the share of the trace that they hold.
    """
    weights, shapes = [], []
    samples = sum(map(batch_size, batches))
    with torch.no_grad():
        for batch in batches:
            z = output_rows(run_model(model, batch)).double()
            # A single column has the output Hessian 1 of half the squared error: one row of weight 1 / N.
            p = z.softmax(1) if z.shape[1] > 1 else torch.ones_like(z)
            distance = 1 - 2 * p + p.square().sum(1, keepdim=True) if z.shape[1] > 1 else torch.ones_like(z)
            # As in the objective, a batch counts by its samples, however many output rows these have.
            weights.append(torch.stack([p, p * distance]).cpu() * (batch_size(batch) / samples / len(z)))
            shapes.append(len(z) // batch_size(batch))
    shares = torch.cat([w[1].flatten() for w in weights])
    order = shares.argsort(descending=True, stable=True)
    held = shares[order].cumsum(0) / shares.sum()
    count = min(int((held < 1 - tolerance).sum()) + 1, max_rows, len(order))
    chosen = torch.zeros(len(shares), dtype=torch.bool)
    chosen[order[:count]] = True
    rows, offset = [], 0
    for b, (w, positions) in enumerate(zip(weights, shapes, strict=True)):
        mask = chosen[offset : offset + w[1].numel()].reshape(w[1].shape)
        offset += w[1].numel()
        for r, c in mask.nonzero().tolist():
            rows.append(OutputRow(b, r // positions, r % positions, c, float(w[0][r, c])))
    return rows, float(held[count - 1])


def row_chunks(rows: Sequence[OutputRow], at_once: int) -> Iterator[tuple[int, Sequence[OutputRow]]]:
    """Runs of at most so many rows that share a batch."""
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and stop - start < at_once and rows[stop].batch == rows[start].batch:
            stop += 1
        yield start, rows[start:stop]
        start = stop


def take_rows(batch: Any, samples: list[int]) -> Any:
    """A batch of the samples with these indices; one may be taken several times."""
    size = batch_size(batch)
    return tree_map_only(Tensor, lambda t: t[samples] if t.ndim and len(t) == size else t, batch)


def output_seed(output: Tensor, chunk: Sequence[OutputRow]) -> Tensor:
    """What to multiply the outputs' gradients by: √(p_c / N) (e_c − p) at each row's own output row."""
    logits = output_rows(output).reshape(len(chunk), -1, output_rows(output).shape[1])
    seed = torch.zeros_like(logits)
    for r, row in enumerate(chunk):
        if logits.shape[2] > 1:
            seed[r, row.position] = -logits[r, row.position].softmax(0)
        seed[r, row.position, row.cls] += 1
        seed[r, row.position] *= row.weight**0.5
    if output.ndim >= 4:
        moved = output.movedim(1, -1)
        return seed.reshape(moved.shape).movedim(-1, 1)
    return seed.reshape(output.shape)
