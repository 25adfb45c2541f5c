"""Row stream: rows of A drawn from outputs that are too large to be kept, such as those over a vocabulary.

Two passes over the outputs, a few positions at a time. The first adds up every position's share of the trace and keeps
the heaviest rows of all; places of the drawn rows then follow from the shares of positions, and the second pass finds
their columns. What is kept is a number a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**22  # of the outputs, looked at together: 16 MB


@dataclass(frozen=True)
class Stretch:
    """Some output rows that follow each other.

    Attributes:
        values: Logits, or values, shape (positions, columns).
        counts: What each position counts, shape (positions,), float64.
        by_distance: Whether the objective is half the mean squared distance of the values.
    """

    values: Tensor
    counts: Tensor
    by_distance: bool = False

    def split(self) -> Iterator[Stretch]:
        """The same in parts of a few million numbers."""
        size = max(_CHUNK_NUMBERS // self.values.shape[1], 1)
        for values, counts in zip(self.values.split(size), self.counts.split(size), strict=True):
            yield Stretch(values, counts, self.by_distance)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Weight of every row of A, and its share of the trace, both of shape (positions, columns), float32."""
        counts = self.counts.to(self.values.device, torch.float32)[:, None]
        if self.by_distance:
            weight = (counts / self.values.shape[1]).expand(self.values.shape)
            return weight, weight
        p = self.values.float().softmax(1)
        return p * counts, p * counts * (1 - 2 * p + p.square().sum(1, keepdim=True)).clamp_min_(0)


@dataclass(frozen=True)
class DrawnRow:
    """One row of A.

    Attributes:
        stretch: Index of the stretch.
        position: Which of its output rows.
        column: The class, or the column of values.
        weight: p_c times what the output row counts.
        probability: How likely the row was to be drawn.
    """

    stretch: int
    position: int
    column: int
    weight: float
    probability: float


@dataclass(frozen=True)
class DrawnRows:
    """Rows in the order of the outputs, and how many they were drawn from."""

    rows: list[DrawnRow]
    candidates: int


def draw_from_stream(stream: Callable[[], Iterator[Stretch]], number: int, draws: torch.Generator) -> DrawnRows:
    """Draw rows with probabilities in proportion to their shares of the output Hessian's trace, without replacement.

    As ``choose_rows`` draws, but that positions come in a random order and not single rows.

    Args:
        stream: Yields the outputs; called twice.
        number: Number of rows.
        draws: Draws the order and the start.

    Returns:
        The rows.

    Example:
        >>> z = torch.tensor([[0.0, 0.0, -90.0], [90.0, 0.0, 0.0]])
        >>> stretch = Stretch(z, torch.full((2,), 0.5).double())
        >>> drawn = draw_from_stream(lambda: iter([stretch]), 2, torch.Generator().manual_seed(0))
        >>> [(row.position, row.column, row.weight) for row in sorted(drawn.rows, key=lambda row: row.column)]
        [(0, 0, 0.25), (0, 1, 0.25)]
    """
    survey = _Survey.of(stream, number)
    certain = survey.certain(number)
    sure = survey.places[:certain]
    light = survey.totals.index_add(0, sure[:, 0], -survey.heavy[:certain]).clamp_min(0)
    turns = number - certain if float(light.sum()) > 1e-9 * float(survey.totals.sum()) else 0
    order = torch.randperm(len(light), generator=draws)
    steps = light[order].cumsum(0)
    step = float(steps[-1]) / max(turns, 1)
    points = (torch.arange(turns) + torch.rand((), generator=draws, dtype=light.dtype)) * step
    turn = torch.searchsorted(steps, points).clamp_max(len(order) - 1)
    depths = points - (steps[turn] - light[order[turn]])  # how far into the shares of its position a row lies
    # Of a certain row the column is known.
    wanted = [(position, column, 0.0) for position, column in sure.tolist()]
    wanted += [(position, None, depth) for position, depth in zip(order[turn].tolist(), depths.tolist(), strict=True)]
    wanted.sort(key=lambda row: row[0])
    return DrawnRows(list(_find(stream, wanted, sure, step)), survey.candidates)


@dataclass(frozen=True)
class _Survey:
    """What the first pass tells.

    Attributes:
        totals: Every position's share, float64.
        heavy: The shares of the heaviest rows, descending, float64.
        places: Their positions and columns, shape (rows, 2).
        candidates: Number of rows whose share is not zero.
    """

    totals: Tensor
    heavy: Tensor
    places: Tensor
    candidates: int

    @classmethod
    def of(cls, stream: Callable[[], Iterator[Stretch]], number: int) -> _Survey:
        totals, candidates, start = [], 0, 0
        heavy, places = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.long)
        for part in (part for stretch in stream() for part in stretch.split()):
            _, share = part.rows()
            totals.append(share.double().sum(1).cpu())
            candidates += int((share > 0).sum())
            best = share.flatten().topk(min(number, share.numel()))
            index = best.indices.cpu()
            here = torch.stack([start + index // share.shape[1], index % share.shape[1]], dim=1)
            heavy, places = torch.cat([heavy, best.values.double().cpu()]), torch.cat([places, here])
            keep = heavy.argsort(descending=True, stable=True)[:number]
            heavy, places = heavy[keep], places[keep]
            start += len(share)
        return cls(torch.cat(totals), heavy, places, candidates)

    def certain(self, number: int) -> int:
        """How many of the heaviest rows are certain: each has at least its turn's part of what is left."""
        left = self.totals.sum() - torch.cat([self.heavy.new_zeros(1), self.heavy.cumsum(0)[:-1]])
        turns = number - torch.arange(len(self.heavy))
        return int((self.heavy * turns >= left.clamp_min(0)).long().cumprod(0).sum())


def _find(
    stream: Callable[[], Iterator[Stretch]], wanted: list[tuple[int, int | None, float]], sure: Tensor, step: float
) -> Iterator[DrawnRow]:
    """The columns and weights of rows whose positions are known, in ascending order."""
    first, place = 0, 0
    for index, stretch in enumerate(stream()):
        while place < len(wanted) and wanted[place][0] < first + len(stretch.values):
            position, column, depth = wanted[place]
            local = position - first
            one = Stretch(stretch.values[local : local + 1], stretch.counts[local : local + 1], stretch.by_distance)
            weight, share = (x[0].double().cpu() for x in one.rows())
            probability = 1.0
            if column is None:
                share = share.index_fill(0, sure[sure[:, 0] == position, 1], 0.0)
                column = min(int(torch.searchsorted(share.cumsum(0), depth)), int(share.nonzero().max()))
                probability = float(share[column]) / step
            yield DrawnRow(index, local, column, float(weight[column]), probability)
            place += 1
        first += len(stretch.values)
