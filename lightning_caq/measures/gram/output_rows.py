"""Output rows: which outputs and classes of which samples make up the rows of A, where H = AᵀA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_caq.errors import CalibrationError
from lightning_caq.network.batches import batch_size, run_model
from lightning_caq.network.objective import output_rows
from lightning_caq.utilities.seeding import generator


@dataclass(frozen=True)
class OutputRow:
    """One row of A: an output of one sample, and the class it belongs to.

    Attributes:
        batch: Index of the batch.
        sample: Index of the sample in the batch.
        position: Index of the output row in the sample; 0 unless a sample has several, as tokens or pixels.
        cls: Class c.
        weight: p_c / (N π), the square of the row's factor.
        probability: π, how likely the row was to be drawn; 1 where all rows were taken.
    """

    batch: int
    sample: int
    position: int
    cls: int
    weight: float
    probability: float = 1.0


@dataclass(frozen=True)
class RowChoice:
    """The rows of A that are computed.

    Attributes:
        rows: The rows, in the order of the batches.
        kept: Share of the output Hessian's trace in the rows that they were taken or drawn from.
        candidates: How many these were; more than ``rows`` where they were drawn at random.
    """

    rows: list[OutputRow]
    kept: float
    candidates: int

    @property
    def sampled(self) -> bool:
        """Whether the rows were drawn at random."""
        return len(self.rows) < self.candidates


def choose_rows(
    model: nn.Module, batches: Sequence[Any], tolerance: float, max_rows: int, *, seed: int = 0
) -> RowChoice:
    """The rows of A worth computing, in the order of the batches.

    A row's share of the trace of the output Hessian is p_c ‖e_c − p‖² / N: a class without probability, or one that has
    it all, adds nothing. The lightest rows are left out, up to the tolerance. If more than ``max_rows`` remain, none is
    left out but ``max_rows`` of all are drawn, with probabilities π in proportion to their shares and without
    replacement: systematic sampling of a random order (Hartley and Rao 1962). Rows whose share alone is above that of
    an average draw are taken for certain. A drawn row counts 1/π times, so that every sum over rows is right in the
    mean over draws (Horvitz and Thompson 1952): AᵀA, its traces, diagonals and quadratic forms, but not its
    eigenvalues.

    Args:
        model: The float network, in eval mode.
        batches: The samples.
        tolerance: Share of the output Hessian's trace that may be left out.
        max_rows: Most rows, at least 2.
        seed: Seed of the draw.

    Returns:
        The rows and what they stand for.

    Raises:
        CalibrationError: If the samples lie along neither the first nor the second axis of the outputs.

    Example:
        >>> certain, unsure = [100.0, 0.0, 0.0], [0.0, 0.0, -100.0]
        >>> choice = choose_rows(nn.Identity(), [torch.tensor([certain, unsure])], tolerance=1e-6, max_rows=9)
        >>> [(row.sample, row.cls, row.weight) for row in choice.rows]
        [(1, 0, 0.25), (1, 1, 0.25)]
    """
    weights, places, samples = [], [], sum(map(batch_size, batches))
    axis = sample_axis(model, batches[0])
    for b, batch in enumerate(batches):
        size = batch_size(batch)
        with torch.no_grad():
            z = _rows(run_model(model, batch), axis, size).double()
        # A single column has the output Hessian 1 of half the squared error: one row of weight 1 / N.
        p = z.softmax(1) if z.shape[1] > 1 else torch.ones_like(z)
        distance = 1 - 2 * p + p.square().sum(1, keepdim=True) if z.shape[1] > 1 else torch.ones_like(z)
        # As in the objective, a batch counts by its samples, however many output rows these have.
        weights.append(torch.stack([p, p * distance.clamp_min(0)]).flatten(1).cpu() * (size / samples / len(z)))
        places.append((b, len(z) // size, z.shape[1]))
    weight, share = torch.cat(weights, dim=1)
    index, probability, kept, candidates = _choose(share, tolerance, max_rows, generator(seed, "rows"))
    edges = torch.tensor([w.shape[1] for w in weights]).cumsum(0)
    rows = []
    for i, pi, b in zip(index.tolist(), probability.tolist(), torch.bucketize(index, edges, right=True), strict=True):
        batch_index, positions, classes = places[int(b)]
        r, c = divmod(i - int(edges[b]) + weights[int(b)].shape[1], classes)
        rows.append(OutputRow(batch_index, r // positions, r % positions, c, float(weight[i]) / pi, pi))
    return RowChoice(rows, kept, candidates)


def _choose(
    share: Tensor, tolerance: float, max_rows: int, draws: torch.Generator
) -> tuple[Tensor, Tensor, float, int]:
    """Of every chosen row the index, ascending, and π; the share of the trace they stand for; rows they are of."""
    order = share.argsort(descending=True, stable=True)
    total = float(share.sum())
    kept = share[order].cumsum(0) / total if total > 0 else torch.ones_like(share)
    count = min(int((kept < 1 - tolerance).sum()) + 1, len(order))
    if count <= max_rows:
        return order[:count].sort().values, torch.ones(count, dtype=share.dtype), float(kept[count - 1]), count
    order = order[: int((share > 0).sum())]
    # The j heaviest are certain as long as each has at least its turn's part of what is left: π would be above 1.
    left = share[order].flip(0).cumsum(0).flip(0)
    certain = int((share[order] * (max_rows - torch.arange(len(order))) >= left).sum())
    light = order[certain:][torch.randperm(len(order) - certain, generator=draws)]
    turns = max_rows - certain
    steps = share[light].cumsum(0) * (turns / share[light].sum())
    points = torch.arange(turns) + torch.rand((), generator=draws, dtype=share.dtype)
    drawn = light[torch.searchsorted(steps, points).clamp_max(len(light) - 1)]
    index = torch.cat([order[:certain], drawn])
    probability = torch.cat([torch.ones(certain, dtype=share.dtype), turns * share[drawn] / share[light].sum()])
    index, place = index.sort()
    return index, probability[place], 1.0, len(order)


def sampling_error(rows: Sequence[OutputRow], terms: Tensor) -> float:
    """Standard error of a sum over drawn rows (Hájek 1964).

    √(n / (n − 1) Σ_r (1 − π_r)(t_r − t̄)²), t̄ = Σ_r (1 − π_r) t_r / Σ_r (1 − π_r), over the n rows that were not
    certain, where t_r is a row's term with its 1/π_r in it.

    Args:
        rows: The rows.
        terms: What each adds to the sum, shape (rows,).

    Returns:
        The standard error; 0 where every row was certain.

    Example:
        >>> rows = [OutputRow(0, s, 0, 0, 1.0, probability=0.5) for s in range(2)]
        >>> round(sampling_error(rows, torch.tensor([1.0, 3.0])) ** 2, 6)  # 2 (½ 1² + ½ 1²)
        2.0
    """
    chance = 1 - torch.tensor([row.probability for row in rows], dtype=torch.float64)
    n = int((chance > 0).sum())
    if n < 2:
        return 0.0
    terms = terms.double().cpu()
    middle = chance @ terms / chance.sum()
    return float((chance @ (terms - middle).square() * n / (n - 1)).sqrt())


def sample_axis(model: nn.Module, batch: Any) -> int:
    """The axis of the outputs along which the samples lie: 0, or 1 where tokens come first.

    Judged by the outputs of one sample alone, whose axis has length 1 for certain.

    Raises:
        CalibrationError: If neither of the first two axes grows with the samples.

    Example:
        >>> class TokensFirst(nn.Module):
        ...     def forward(self, x):
        ...         return x.transpose(0, 1)
        >>> sample_axis(TokensFirst(), torch.zeros(4, 3, 5))
        1
    """
    with torch.no_grad():
        one, two = (run_model(model, take_rows(batch, [0] * count)).shape for count in (1, 2))
    if len(two) == len(one) and two[0] == 2 * one[0]:
        return 0
    if len(two) == len(one) == 3 and two[1] == 2 and one[1] == 1:
        return 1
    raise CalibrationError(
        f"The outputs of one sample have the shape {list(one)}, those of two {list(two)}; samples must lie along the "
        "first axis, or along the second of three as (tokens, samples, classes)."
    )


def _rows(output: Tensor, axis: int, samples: int) -> Tensor:
    """Output rows, sample by sample, shape (rows, classes)."""
    rows = output_rows(output.movedim(axis, 0))
    if len(rows) % samples:
        raise CalibrationError(
            f"Outputs of shape {list(output.shape)} are no whole number of rows for each of {samples} samples."
        )
    return rows


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


def output_seed(output: Tensor, chunk: Sequence[OutputRow], axis: int) -> Tensor:
    """What to multiply the outputs' gradients by: √weight (e_c − p) at each row's own output row."""
    moved = output.movedim(axis, 0)
    logits = _rows(output, axis, len(chunk))
    logits = logits.reshape(len(chunk), -1, logits.shape[1])
    seed = torch.zeros_like(logits)
    for r, row in enumerate(chunk):
        if logits.shape[2] > 1:
            seed[r, row.position] = -logits[r, row.position].softmax(0)
        seed[r, row.position, row.cls] += 1
        seed[r, row.position] *= row.weight**0.5
    if output.ndim >= 4:
        last = moved.movedim(1, -1)
        return seed.reshape(last.shape).movedim(-1, 1)
    return seed.reshape(moved.shape).movedim(0, axis)
