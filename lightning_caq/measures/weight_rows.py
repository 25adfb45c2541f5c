"""Weight rows: the rows of A_i, gradients of single outputs by a layer's weight, held for a few layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.batches import run_model
from lightning_caq.layers import Layer, layer_weight
from lightning_caq.matrix import columns
from lightning_caq.measures.output_rows import OutputRow, output_seed, row_chunks, take_rows
from lightning_caq.visits import watching

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Piece:
    """Some output channels of a layer, whose rows fit in memory together.

    Attributes:
        layer: The layer.
        outputs: Which rows of its matrix, in every group.
    """

    layer: Layer
    outputs: slice

    def numbers(self, rows: int) -> int:
        """Numbers that so many rows take."""
        groups, outputs, width = _matrix_shape(self.layer)
        outputs = len(range(outputs)[self.outputs])
        return rows * (outputs + width if _is_outer_product(self.layer) else groups * outputs * width)

    def __hash__(self) -> int:
        return hash((self.layer.name, self.outputs.start))


@dataclass(frozen=True)
class DenseRows:
    """Rows of A_i as they are, shape (rows, groups · outputs · columns)."""

    rows: Tensor

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows)."""
        return self.rows @ self.rows.T

    def project(self, delta: Tensor) -> Tensor:
        """A_i Δ for an error given as matrices, shape (rows,)."""
        return self.rows @ delta.flatten().to(self.rows)


@dataclass(frozen=True)
class OuterProducts:
    """Rows of A_i that are outer products g xᵀ, as those of a linear layer on vectors: only g and x are held."""

    gradients: Tensor
    inputs: Tensor

    def gram(self) -> Tensor:
        """A_i A_iᵀ, shape (rows, rows)."""
        # ⟨g xᵀ, h yᵀ⟩ = ⟨g, h⟩ ⟨x, y⟩
        return (self.gradients @ self.gradients.T) * (self.inputs @ self.inputs.T)

    def project(self, delta: Tensor) -> Tensor:
        """A_i Δ for an error given as matrices, shape (rows,)."""
        return ((self.inputs @ delta[0].T.to(self.inputs)) * self.gradients).sum(1)


def weight_rows(
    model: nn.Module, pieces: Sequence[Piece], batches: Sequence[Any], rows: Sequence[OutputRow]
) -> dict[Piece, DenseRows | OuterProducts]:
    """The rows of A_i for some pieces, in one pass over the samples that the rows belong to."""
    by_layer: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_layer.setdefault(piece.layer.name, []).append(piece)
    watched = {id(model.get_submodule(name)): piece.layer for piece in pieces for name in piece.layer.modules}
    held = {piece: _empty(piece, len(rows), layer_weight(model, piece.layer).dtype) for piece in pieces}
    at_once = _ROWS_AT_ONCE if _samples_come_first(model, watched, batches, rows[:1]) else 1
    for start, chunk in row_chunks(rows, at_once):
        batch = take_rows(batches[chunk[0].batch], [row.sample for row in chunk])
        with _recording(model, watched) as calls, torch.enable_grad():
            output = run_model(model, batch)
        seed = output_seed(output.detach(), chunk)
        gradients = torch.autograd.grad(output, [y for _, _, _, y in calls], grad_outputs=seed, allow_unused=True)
        place = slice(start, start + len(chunk))
        for (layer, module, x, _), gradient in zip(calls, gradients, strict=True):
            if gradient is None:
                continue
            for piece in by_layer[layer.name]:
                _add(held[piece], place, piece, module, x, gradient)
    return held


def _samples_come_first(
    model: nn.Module, watched: Mapping[int, Layer], batches: Sequence[Any], rows: Sequence[OutputRow]
) -> bool:
    """Whether the first axis of every layer's input grows with the samples.

    Tokens may lie there too, sample by sample; where they lie before the samples, rows can be told apart only one by
    one.
    """
    lengths = []
    for count in (1, 2):
        batch = take_rows(batches[rows[0].batch], [rows[0].sample] * count)
        with _recording(model, watched) as calls, torch.no_grad():
            run_model(model, batch)
        lengths.append([len(x) for _, _, x, _ in calls])
    return len(lengths[0]) == len(lengths[1]) and all(b == 2 * a for a, b in zip(*lengths, strict=True))


def _matrix_shape(layer: Layer) -> tuple[int, int, int]:
    """Groups, outputs and columns of the layer as matrices; an embedding's rows are its words."""
    outputs = layer.shape[1] if layer.transposed else layer.shape[0] // layer.groups
    return layer.groups, outputs, layer.weights // (layer.groups * outputs)


def _is_outer_product(layer: Layer) -> bool:
    """Whether the layer multiplies one vector a sample, once."""
    return layer.kind == "linear" and layer.calls == 1 and layer.macs == layer.weights


def _empty(piece: Piece, rows: int, dtype: torch.dtype) -> DenseRows | OuterProducts:
    groups, outputs, width = _matrix_shape(piece.layer)
    outputs = len(range(outputs)[piece.outputs])
    if _is_outer_product(piece.layer):
        return OuterProducts(torch.zeros(rows, outputs, dtype=dtype), torch.zeros(rows, width, dtype=dtype))
    return DenseRows(torch.zeros(rows, groups * outputs * width, dtype=dtype))


def passes(layers: Sequence[Layer], rows: int, memory: int) -> Iterator[list[Piece]]:
    """Pieces of layers, as many at a time as fit in memory; each list is one pass over the samples."""
    group: list[Piece] = []
    for layer in layers:
        outputs = _matrix_shape(layer)[1]
        whole = 4 * Piece(layer, slice(0, outputs)).numbers(rows)
        step = max(1, outputs * memory // whole) if whole > memory else outputs
        for start in range(0, outputs, step):
            piece = Piece(layer, slice(start, min(start + step, outputs)))
            if group and 4 * sum(p.numbers(rows) for p in (*group, piece)) > memory:
                yield group
                group = []
            group.append(piece)
    yield group


Call = tuple[Layer, nn.Module, Tensor, Tensor]


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


def _add(
    held: DenseRows | OuterProducts, place: slice, piece: Piece, module: nn.Module, inputs: Tensor, gradient: Tensor
) -> None:
    """Add what one call of a layer contributes to some rows."""
    layer = piece.layer
    if isinstance(held, OuterProducts):
        held.gradients[place] += gradient.flatten(1)[:, piece.outputs].to(held.gradients)
        held.inputs[place] += inputs.flatten(1).to(held.inputs)
        return
    if isinstance(module, nn.Embedding):
        matrices = _word_gradients(layer, inputs, gradient)[:, :, piece.outputs]
    else:
        if isinstance(module, nn.Linear):
            layer = replace(layer, kind="linear")  # it may share the table of an embedding
            outs = gradient.reshape(len(gradient), 1, -1, gradient.shape[-1]).transpose(2, 3)
        else:
            outs = gradient.flatten(2).reshape(len(gradient), layer.groups, -1, gradient[0, 0].numel())
        patches = columns(layer, module, inputs)  # (samples, groups, columns, positions)
        matrices = outs[:, :, piece.outputs] @ patches.transpose(2, 3)
    # A sample may fill several places of the first axis, as its tokens do where they were made a batch of their own.
    rows = held.rows[place]
    rows += matrices.reshape(len(rows), -1, rows.shape[1]).sum(1).to(rows)


def _word_gradients(layer: Layer, words: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of every sample with respect to an embedding, shape (samples, 1, words, dimensions)."""
    result = gradient.new_zeros(len(words), layer.shape[0], layer.shape[1])
    index = words.reshape(len(words), -1, 1).expand(-1, -1, layer.shape[1])
    return result.scatter_add_(1, index, gradient.reshape(index.shape))[:, None]
