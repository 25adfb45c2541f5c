"""Weight rows: the rows of A_i, gradients of single outputs by a layer's weight, held for a few layers at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.folded_rows import FoldedRows
from lightning_caq.measures.gram.layer_calls import Call, Layout, Pass, Rows, call_factors, find_layout, put_factors
from lightning_caq.measures.gram.output_rows import OutputRow, output_seed
from lightning_caq.measures.gram.pieces import Piece, rows_at_once
from lightning_caq.measures.gram.row_forms import DenseRows, ExactRows
from lightning_caq.network.batches import pick
from lightning_caq.network.layer_matrix import to_matrix
from lightning_caq.network.layers import layer_modules, layer_weight
from lightning_caq.utilities.structures import tensors


def weight_rows(
    model: nn.Module, pieces: Sequence[Piece], batches: Sequence[Any], rows: Sequence[OutputRow]
) -> dict[Piece, ExactRows]:
    """The rows of A_i for some pieces, in one pass over the samples that the rows belong to.

    Args:
        model: The network, in eval mode; the weights of the layers require gradients.
        pieces: The pieces.
        batches: The samples.
        rows: The output rows, in the order of the batches.

    Returns:
        Piece to its rows.
    """
    piece_rows = {piece: piece.empty(len(rows), layer_weight(model, piece.layer)) for piece in pieces}
    fill_rows(model, piece_rows, batches, rows)
    return piece_rows


def fill_rows(
    model: nn.Module,
    piece_rows: Mapping[Piece, Rows],
    batches: Sequence[Any],
    rows: Sequence[OutputRow],
    *,
    memory: int = 2**28,
) -> None:
    """Put the rows of A_i of some pieces where they are kept, in one pass over the samples that the rows belong to.

    Args:
        model: The network, in eval mode; the weights of the layers require gradients.
        piece_rows: The pieces, each with the empty rows to fill.
        batches: The samples.
        rows: The output rows, in the order of the batches.
        memory: Bytes that what is computed together may take, by a rough count.
    """
    computed = _WeightRows(model, piece_rows, batches, rows, memory)
    start = 0
    while start < len(rows):
        start = computed.take(start)


class _WeightRows:
    """The rows of some pieces, filled in run by run."""

    def __init__(
        self,
        model: nn.Module,
        pieces: Mapping[Piece, Rows],
        batches: Sequence[Any],
        rows: Sequence[OutputRow],
        memory: int,
    ) -> None:
        self._model, self._batches, self._outputs = model, batches, rows
        self._rows, self._at_once = pieces, rows_at_once(pieces, memory)
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.layer.name, []).append(piece)
        self._watched = {id(m): p.layer for p in pieces if not p.direct for m in layer_modules(model, p.layer)}
        self._direct = {p.layer.name: layer_weight(model, p.layer) for p in pieces if p.direct}
        self._layouts: dict[Any, Layout | None] = {}

    def take(self, start: int) -> int:
        """Fill in the rows from one on, as far as one pass reaches; returns the first that is left."""
        batch = self._batches[self._outputs[start].batch]
        layout = None if self._direct else self._layout(batch)
        if layout is not None:
            stop = self._stop(start, lambda row: row.batch, self._at_once)
            chunk = self._outputs[start:stop]
            run = Pass.over(self._model, self._watched, pick(batch, [row.sample for row in chunk]))
            if layout.fits(run.calls, len(chunk)):
                self._fill(start, chunk, run, layout.axes)
                return stop
        # Rows can be told apart only one by one; those of one sample share its pass.
        stop = self._stop(start, lambda row: (row.batch, row.sample), len(self._outputs))
        run = Pass.over(self._model, self._watched, pick(batch, [self._outputs[start].sample]))
        for index in range(start, stop):
            self._fill(index, self._outputs[index : index + 1], run, [0] * len(run.calls), keep=index + 1 < stop)
        return stop

    def _layout(self, batch: Any) -> Layout | None:
        key = tuple(tensor.shape for tensor in tensors(pick(batch, [0])))
        if key not in self._layouts:
            self._layouts[key] = find_layout(self._model, self._watched, batch)
        return self._layouts[key]

    def _stop(self, start: int, place: Any, at_most: int) -> int:
        """The end of a run of rows that share a place."""
        stop = start + 1
        first = place(self._outputs[start])
        while stop < min(len(self._outputs), start + at_most) and place(self._outputs[stop]) == first:
            stop += 1
        return stop

    def _fill(
        self, start: int, chunk: Sequence[OutputRow], run: Pass, axes: Sequence[int], *, keep: bool = False
    ) -> None:
        """Take the gradients of some rows, and write them; ``keep`` the graph for others."""
        seed = output_seed(run.outputs.with_values(run.outputs.values.detach()), chunk)
        wanted = [y for _, _, _, y in run.calls]
        gradients = torch.autograd.grad(
            run.outputs.values, [*wanted, *self._direct.values()], seed, allow_unused=True, retain_graph=keep
        )
        by_layer: dict[str, list[Call]] = {}
        for (layer, module, x, _), g, axis in zip(run.calls, gradients[: len(wanted)], axes, strict=True):
            if g is not None:
                by_layer.setdefault(layer.name, []).append((layer, module, x.movedim(axis, 0), g.movedim(axis, 0)))
        if not keep:
            run.calls.clear()  # with the inputs, once a layer is done with
        place = slice(start, start + len(chunk))
        self._put_direct(place, gradients[len(wanted) :])
        del gradients
        while by_layer:
            name, calls = by_layer.popitem()
            factors = [call_factors(*call, len(chunk)) for call in calls]  # of one layer at a time: columns are large
            for piece in self._pieces[name]:
                put_factors(self._rows[piece], place, piece.outputs, factors)

    def _put_direct(self, place: slice, gradients: Sequence[Tensor | None]) -> None:
        """Write gradients by the weights themselves."""
        for name, gradient in zip(self._direct, gradients, strict=True):
            for piece in self._pieces[name] if gradient is not None else ():
                rows = self._rows[piece]
                assert gradient is not None
                dense = to_matrix(piece.layer, gradient)[:, piece.cut].reshape(1, -1)
                if isinstance(rows, FoldedRows):
                    rows.put_dense(place, dense)
                else:
                    assert isinstance(rows, DenseRows)
                    rows.rows[place] += dense.to(rows.rows)
