"""Pieces: some output channels of some layers, whose rows fit in memory together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_caq.measures.gram.row_forms import DenseRows, ExactRows, FactoredRows, WordRows
from lightning_caq.measures.gram.weight_uses import matrix_shape, unaccounted
from lightning_caq.network.batches import pick
from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, layer_modules

_MOST_AT_ONCE = 32
# Beside a layer's output: its copy, what normalisation and activation make of it, and the gradient.
_TENSORS_A_CALL = 5


@dataclass(frozen=True)
class Piece:
    """Some output channels of a layer, whose rows fit in memory together.

    Attributes:
        layer: The layer.
        outputs: Which rows of its matrix, in every group; for an embedding which words.
        positions: How often the layer is applied to one sample.
        looked_up: Whether the layer does nothing but look up words.
        direct: Whether rows are gradients by the weight itself, as it acts otherwise than in its modules' calls alone.
    """

    layer: Layer
    outputs: range
    positions: int
    looked_up: bool = False
    direct: bool = False

    @property
    def cut(self) -> slice:
        """The outputs, to index with."""
        return slice(self.outputs.start, self.outputs.stop)

    @property
    def factored(self) -> bool:
        """Whether a product of two rows takes fewer multiplications by their factors than number by number."""
        _, outputs, width = matrix_shape(self.layer)
        return not self.looked_up and not self.direct and _by_factors(outputs, width, self.positions) <= outputs * width

    def numbers(self, rows: int) -> int:
        """Numbers that so many rows take."""
        groups, whole, width = matrix_shape(self.layer)
        outputs = len(self.outputs)
        if self.looked_up:
            return rows * max(1, self.positions * width * outputs // whole)
        return rows * groups * (self.positions * (outputs + width) if self.factored else outputs * width)

    def empty(self, rows: int, like: Tensor) -> ExactRows:
        """Room for so many rows, of the type of a tensor and beside it."""
        groups, _, width = matrix_shape(self.layer)
        if self.looked_up:
            return WordRows(rows, self.outputs, width, like.dtype, like.device)
        if self.factored:
            return FactoredRows(rows, groups, len(self.outputs), width, self.positions, like.dtype, like.device)
        return DenseRows(rows, groups, len(self.outputs), width, like.dtype, like.device)


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


def whole_pieces(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> list[Piece]:
    """Every layer as one piece; the first sample tells how often each is applied."""
    sample = pick(batches[0], [0])
    positions, direct = _positions(model, layers, sample), unaccounted(model, layers, sample)
    pieces = []
    for layer in layers:
        by_itself = layer.name in direct
        looked_up = not by_itself and all(isinstance(m, nn.Embedding) for m in layer_modules(model, layer))
        pieces.append(Piece(layer, range(matrix_shape(layer)[1]), positions[layer.name], looked_up, by_itself))
    return pieces


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
    group: list[Piece] = []
    taken = 0
    for whole in whole_pieces(model, layers, batches):
        outputs, size = len(whole.outputs), 4 * whole.numbers(rows)
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


def rows_at_once(pieces: Iterable[Piece], memory: int) -> int:
    """How many rows can be computed together: one layer's columns and rows have to fit, and the outputs of all.

    Args:
        pieces: The pieces whose rows are computed.
        memory: Bytes that they may take, by a rough count.

    Example:
        >>> rows_at_once([Piece(Layer("", "linear", (1000, 1000)), range(1000), 1)], memory=2**23)
        2
    """
    whole = outputs = 0
    for piece in pieces:
        groups, channels, width = matrix_shape(piece.layer)
        columns = piece.positions * (width if piece.looked_up else groups * (channels + width))
        whole = max(whole, 2 * columns + (0 if piece.looked_up else groups * len(piece.outputs) * width))
        outputs += piece.positions * (width if piece.looked_up else groups * channels)
    return min(max(memory // (4 * (whole + _TENSORS_A_CALL * outputs)), 1), _MOST_AT_ONCE)
