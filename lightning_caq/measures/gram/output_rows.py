"""Output rows: which outputs and classes of which samples make up the rows of A, where H = AᵀA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.row_stream import Stretch, draw_from_stream
from lightning_caq.network.batches import batch_size
from lightning_caq.network.forward import run_model
from lightning_caq.network.outputs import Outputs, Part
from lightning_caq.utilities.seeding import generator

_MOST_KEPT = 2**22  # numbers in the outputs of all samples, 100 bytes each


@dataclass(frozen=True)
class OutputRow:
    """One row of A: an output of one sample, and the class it belongs to.

    Attributes:
        batch: Index of the batch.
        sample: Index of the sample in the batch.
        position: Index of the output row in the sample; 0 unless a sample has several, as tokens or pixels.
        cls: Class c, or a column of values.
        weight: p_c / (N π), the square of the row's factor; of C columns of values 1 / (C N π) each.
        probability: π, how likely the row was to be drawn; 1 where all rows were taken.
        part: Index of the tensor among those that the network returns.
    """

    batch: int
    sample: int
    position: int
    cls: int
    weight: float
    probability: float = 1.0
    part: int = 0


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
    model: nn.Module,
    batches: Sequence[Any],
    tolerance: float,
    max_rows: int,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> RowChoice:
    """The rows of A worth computing, in the order of the batches.

    A row's share of the trace of the output Hessian is p_c ‖e_c − p‖² / N: a class without probability, or one that has
    it all, adds nothing. The output Hessian of half a mean squared error over C columns is 1 / C times the identity: a
    row for each column. Positions that do not count have no rows.

    The lightest rows are left out, up to the tolerance. If more than ``max_rows`` remain, none is left out but
    ``draws`` of all are drawn, with probabilities π in proportion to their shares and without replacement:
    systematic sampling of a random order (Hartley and Rao 1962). Rows whose share alone is above that of an average
    draw are taken for certain. A drawn row counts 1/π times, so that every sum over rows is right in the mean over
    draws (Horvitz and Thompson 1952): AᵀA, its traces, diagonals and quadratic forms, but not its eigenvalues.
    Outputs of more than a few million numbers, as over a vocabulary, are not kept: rows are then always drawn, in two
    passes (``draw_from_stream``).

    Args:
        model: The float network, in eval mode.
        batches: The samples.
        tolerance: Share of the output Hessian's trace that may be left out.
        max_rows: Most rows that are all taken, at least 2.
        draws: How many are drawn of more, at least 2; ``max_rows`` by default.
        seed: Seed of the draw.

    Returns:
        The rows and what they stand for.

    Example:
        >>> certain, unsure = [100.0, 0.0, 0.0], [0.0, 0.0, -100.0]
        >>> choice = choose_rows(nn.Identity(), [torch.tensor([certain, unsure])], tolerance=1e-6, max_rows=9)
        >>> [(row.sample, row.cls, row.weight) for row in choice.rows]
        [(1, 0, 0.25), (1, 1, 0.25)]
    """
    weights, places, samples = [], [], sum(map(batch_size, batches))
    draws = draws or max_rows
    for b, batch in enumerate(batches):
        with torch.no_grad():
            outputs = run_model(model, batch)
        if outputs.values[0].numel() * samples > max(_MOST_KEPT, max_rows):
            return _draw_from_stream(model, batches, draws, generator(seed, "rows"))
        for index, part in enumerate(outputs.parts):
            # As in the objective, a batch counts by its samples, however many output rows these have.
            weights.append(_weights(outputs, part) / samples)
            places.append((b, index, part))
    weight, share = torch.cat(weights, dim=1)
    chosen, probability, kept, candidates = _choose(share, tolerance, max_rows, draws, generator(seed, "rows"))
    edges = torch.tensor([w.shape[1] for w in weights]).cumsum(0)
    rows = []
    for i, pi, b in zip(chosen.tolist(), probability.tolist(), torch.bucketize(chosen, edges, right=True), strict=True):
        batch_index, index, part = places[int(b)]
        r, c = divmod(i - int(edges[b]) + weights[int(b)].shape[1], part.columns)
        sample, position = divmod(r, part.positions)
        rows.append(OutputRow(batch_index, sample, position, c, float(weight[i]) / pi, pi, index))
    return RowChoice(rows, kept, candidates)


def _draw_from_stream(model: nn.Module, batches: Sequence[Any], number: int, draws: torch.Generator) -> RowChoice:
    samples = sum(map(batch_size, batches))
    places: list[tuple[int, int, Part]] = []

    def stream() -> Iterator[Stretch]:
        places.clear()
        for b, batch in enumerate(batches):
            with torch.no_grad():
                outputs = run_model(model, batch)
            for index, part in enumerate(outputs.parts):
                places.append((b, index, part))
                z = part.rows(outputs.values)
                yield Stretch(z.flatten(0, 1), (part.shares(len(z)) / samples).flatten(), part.by_distance)

    drawn, rows = draw_from_stream(stream, number, draws), []
    for row in drawn.rows:
        b, index, part = places[row.stretch]
        sample, position = divmod(row.position, part.positions)
        weight = row.weight / row.probability
        rows.append(OutputRow(b, sample, position, row.column, weight, row.probability, index))
    return RowChoice(rows, 1.0, drawn.candidates)


def _weights(outputs: Outputs, part: Part) -> Tensor:
    """Weight of every row of one tensor, and its share of the output Hessian's trace, shape (2, rows), float64."""
    z = part.rows(outputs.values).double().cpu()
    shares = part.shares(len(z))[:, :, None]
    if part.by_distance:
        return torch.stack([(shares / part.columns).expand(z.shape).flatten()] * 2)
    p = z.softmax(2)
    distance = 1 - 2 * p + p.square().sum(2, keepdim=True)
    return torch.stack([p * shares, p * shares * distance.clamp_min(0)]).flatten(1)


def _choose(
    share: Tensor, tolerance: float, max_rows: int, number: int, draws: torch.Generator
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
    certain = int((share[order] * (number - torch.arange(len(order))) >= left).sum())
    light = order[certain:][torch.randperm(len(order) - certain, generator=draws)]
    turns = number - certain
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


def output_seed(outputs: Outputs, chunk: Sequence[OutputRow]) -> Tensor:
    """What to multiply the outputs' gradients by: √weight (e_c − p), or √weight e_c, at each row's own output row.

    Args:
        outputs: The network's outputs, of one sample for each row.
        chunk: The rows.

    Returns:
        Shape of the outputs' values.
    """
    seed = torch.zeros_like(outputs.values)
    for r, row in enumerate(chunk):
        part = outputs.parts[row.part]
        if row.position >= part.positions:
            continue  # shorter by itself than beside longer samples, where this is padding
        start = part.start + row.position * part.columns
        place = seed[r, start : start + part.columns]
        if not part.by_distance:
            place -= part.rows(outputs.values[r : r + 1])[0, row.position].softmax(0)
        place[row.cls] += 1
        place *= row.weight**0.5 * part.unit
    return seed
