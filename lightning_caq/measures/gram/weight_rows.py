"""Weight rows: the rows of A_i, gradients of single outputs by a layer's weight, held for a few layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.output_rows import OutputRow, output_seed, row_chunks, sample_axis, take_rows
from lightning_caq.measures.gram.row_forms import DenseRows, FactoredRows, Rows, WordRows
from lightning_caq.network.batches import run_model
from lightning_caq.network.hooks import visit_modules, watching
from lightning_caq.network.layer_matrix import columns
from lightning_caq.network.layers import Layer, layer_modules, layer_weight
from lightning_caq.utilities.seeding import generator

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Piece:
    """Some output channels of a layer, whose rows fit in memory together.

    Attributes:
        layer: The layer.
        outputs: Which rows of its matrix, in every group; for an embedding which words.
        positions: How often the layer is applied to one sample.
        looked_up: Whether the layer does nothing but look up words.
    """

    layer: Layer
    outputs: range
    positions: int
    looked_up: bool = False

    @property
    def cut(self) -> slice:
        """The outputs, to index with."""
        return slice(self.outputs.start, self.outputs.stop)

    @property
    def factored(self) -> bool:
        """Whether a product of two rows takes fewer multiplications by their factors than number by number."""
        _, outputs, width = matrix_shape(self.layer)
        return not self.looked_up and _by_factors(outputs, width, self.positions) <= outputs * width

    def numbers(self, rows: int) -> int:
        """Numbers that so many rows take."""
        groups, whole, width = matrix_shape(self.layer)
        outputs = len(self.outputs)
        if self.looked_up:
            return rows * max(1, self.positions * width * outputs // whole)
        return rows * groups * (self.positions * (outputs + width) if self.factored else outputs * width)

    def empty(self, rows: int, like: Tensor) -> Rows:
        """Room for so many rows, of the type of a tensor and beside it."""
        groups, _, width = matrix_shape(self.layer)
        if self.looked_up:
            return WordRows(rows, self.outputs, width, like.dtype, like.device)
        if self.factored:
            return FactoredRows(rows, groups, len(self.outputs), width, self.positions, like.dtype, like.device)
        return DenseRows(rows, groups, len(self.outputs), width, like.dtype, like.device)


def matrix_shape(layer: Layer) -> tuple[int, int, int]:
    """Groups, outputs and columns of the layer as matrices; an embedding's rows are its words."""
    outputs = layer.shape[1] if layer.transposed else layer.shape[0] // layer.groups
    return layer.groups, outputs, layer.weights // (layer.groups * outputs)


def pair_work(layer: Layer, positions: int) -> int:
    """Multiplications for the product of two rows, with a layer that is so often applied to a sample.

    Example:
        >>> pair_work(Layer("", "linear", (50, 40)), 1), pair_work(Layer("", "linear", (50, 40)), 64)
        (91, 2000)
    """
    groups, outputs, width = matrix_shape(layer)
    return groups * min(outputs * width, _by_factors(outputs, width, positions))


def _by_factors(outputs: int, width: int, positions: int) -> int:
    return positions**2 * (outputs + width + 1)


def passes(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], rows: int, memory: int
) -> Iterator[list[Piece]]:
    """Pieces of layers, as many at a time as fit in memory; each list is one pass over the samples.

    Args:
        model: The network.
        layers: The layers.
        batches: The samples; the first tells how often each layer is applied.
        rows: Number of rows.
        memory: Bytes that they may take.
    """
    positions = _positions(model, layers, take_rows(batches[0], [0]))
    group: list[Piece] = []
    taken = 0
    for layer in layers:
        outputs = matrix_shape(layer)[1]
        looked_up = all(isinstance(module, nn.Embedding) for module in layer_modules(model, layer))
        whole = Piece(layer, range(outputs), positions[layer.name], looked_up)
        size = 4 * whole.numbers(rows)
        step = max(1, outputs * memory // size) if size > memory else outputs
        for start in range(0, outputs, step):
            piece = replace(whole, outputs=range(start, min(start + step, outputs)))
            if group and 4 * (taken + piece.numbers(rows)) > memory:
                yield group
                group, taken = [], 0
            group.append(piece)
            taken += piece.numbers(rows)
    if group:
        yield group


def _positions(model: nn.Module, layers: Sequence[Layer], sample: Any) -> dict[str, int]:
    """How often each layer is applied to a sample, all calls together; at least 1."""
    counts = dict.fromkeys((layer.name for layer in layers), 0)
    watched = {id(module): layer for layer in layers for module in layer_modules(model, layer)}

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        layer = watched[id(module)]
        side = inputs if layer.transposed else output
        channels = side.shape[1] if layer.kind.startswith("conv") else side.shape[-1]
        counts[layer.name] += side.numel() // channels

    visit_modules(model, [m for m in model.modules() if id(m) in watched], [sample], visit)
    return {name: max(count, 1) for name, count in counts.items()}


def weight_rows(
    model: nn.Module, pieces: Sequence[Piece], batches: Sequence[Any], rows: Sequence[OutputRow]
) -> dict[Piece, Rows]:
    """The rows of A_i for some pieces, in one pass over the samples that the rows belong to."""
    by_layer: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_layer.setdefault(piece.layer.name, []).append(piece)
    watched = {id(module): piece.layer for piece in pieces for module in layer_modules(model, piece.layer)}
    piece_rows = {piece: piece.empty(len(rows), layer_weight(model, piece.layer)) for piece in pieces}
    first = take_rows(batches[rows[0].batch], [rows[0].sample])
    axis = sample_axis(model, first)
    axes = _sample_axes(model, watched, first, axis)
    for start, chunk in row_chunks(rows, _ROWS_AT_ONCE if axes else 1):
        batch = take_rows(batches[chunk[0].batch], [row.sample for row in chunk])
        with _recording(model, watched) as calls, torch.enable_grad():
            output = run_model(model, batch)
        seed = output_seed(output.detach(), chunk, axis)
        gradients = torch.autograd.grad(output, [y for _, _, _, y in calls], grad_outputs=seed, allow_unused=True)
        layer_calls: dict[str, list[tuple[Layer, nn.Module, Tensor, Tensor]]] = {}
        for (layer, module, x, _), g, d in zip(calls, gradients, axes or [0] * len(calls), strict=True):
            if g is not None:
                layer_calls.setdefault(layer.name, []).append((layer, module, x.movedim(d, 0), g.movedim(d, 0)))
        del calls, output, gradients  # with the graph
        place = slice(start, start + len(chunk))
        while layer_calls:
            name, calls_of_layer = layer_calls.popitem()
            # Of one layer at a time: columns are large.
            factors = [_factors(*call, len(chunk)) for call in calls_of_layer]
            for piece in by_layer[name]:
                _put(piece_rows[piece], place, piece, factors)
    return piece_rows


Call = tuple[Layer, nn.Module, Tensor, Tensor]
Factors = tuple[Tensor, Tensor]


def _sample_axes(model: nn.Module, watched: Mapping[int, Layer], sample: Any, axis: int) -> list[int] | None:
    """Of every call the axis along which the samples lie, and within it one after the other.

    Two copies of a sample are run, of which only the first has an output that counts: the gradient of a call is zero in
    the half that belongs to the second. Where there is no such half, as where tokens and samples share an axis with the
    tokens first, rows can be told apart only one by one: ``None``.
    """
    with _recording(model, watched) as alone, torch.no_grad():
        run_model(model, sample)
    with _recording(model, watched) as calls, torch.enable_grad():
        output = run_model(model, take_rows(sample, [0, 0]))
    seed = torch.randn(output.shape, generator=generator(0, "axes")).to(output)
    seed.narrow(axis, output.shape[axis] // 2, output.shape[axis] // 2).zero_()
    gradients = torch.autograd.grad(output, [y for _, _, _, y in calls], grad_outputs=seed, allow_unused=True)
    if len(alone) != len(calls):
        return None
    axes = []
    for (_, _, x, _), (_, _, y, _), g in zip(alone, calls, gradients, strict=True):
        doubled = [d for d in range(y.ndim) if y.shape[d] == 2 * x.shape[d]]
        apart = [d for d in doubled if g is None or not g.narrow(d, x.shape[d], x.shape[d]).any()]
        if not apart:
            return None
        axes.append(apart[0])
    return axes


@contextmanager
def _recording(model: nn.Module, weights: Mapping[int, Layer]) -> Iterator[list[Call]]:
    """Note layer, module, input and output of every call of the layers, outputs as nodes of the graph."""
    calls: list[Call] = []

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((weights[id(module)], module, inputs.detach(), output))
        return output.clone()  # what follows may work in place

    with watching([m for m in model.modules() if id(m) in weights], hook):
        yield calls


def _factors(layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor, rows: int) -> Factors:
    """What one call of a layer contributes to some rows.

    Returns:
        g_t, shape (rows, groups, positions, outputs), and x_t, shape (rows, groups, positions, columns); of a look-up
        gradients of shape (rows, positions, width) and words of shape (rows, positions).
    """
    if isinstance(module, nn.Embedding):
        return gradient.reshape(rows, -1, gradient.shape[-1]), inputs.reshape(rows, -1)
    if isinstance(module, nn.Linear):
        layer = replace(layer, kind="linear")  # it may share the table of an embedding
        outs = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
    else:
        outs = gradient.flatten(2).reshape(len(gradient), layer.groups, -1, gradient[0, 0].numel())
    return _by_row(outs, rows), _by_row(columns(layer, module, inputs), rows)


def _by_row(parts: Tensor, rows: int) -> Tensor:
    """Positions before numbers, shape (rows, groups, positions, numbers).

    A sample may fill several places of the first axis, as its tokens do where they were made a batch of their own.
    """
    several: Tensor = parts.unflatten(0, (rows, -1))
    return several.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _put(piece_rows: Rows, place: slice, piece: Piece, factors: Sequence[Factors]) -> None:
    """Add what the calls of a layer contribute to some rows."""
    if isinstance(piece_rows, FactoredRows):
        gradients, inputs = zip(*factors, strict=True)
        piece_rows.put(place, torch.cat(gradients, 2)[..., piece.cut], torch.cat(inputs, 2))
        return
    for g, x in factors:
        if isinstance(piece_rows, WordRows):
            piece_rows.put(place, g, x)
        elif g.ndim == 4:
            piece_rows.put(place, g[..., piece.cut], x)
        else:  # a look-up in a table that a linear layer shares: one-hot words take the part of the gradients
            words = torch.arange(piece.outputs.start, piece.outputs.stop, device=x.device)
            piece_rows.put(place, (x[..., None] == words)[:, None].to(g), g[:, None])
