"""Layer calls: one pass over some samples, with every call of the layers, and what a call contributes to gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.folded_rows import FoldedRows
from lightning_caq.measures.gram.row_forms import DenseRows, ExactRows, WordRows
from lightning_caq.network.batches import batch_size, pick
from lightning_caq.network.forward import run_model
from lightning_caq.network.hooks import watching
from lightning_caq.network.layer_matrix import columns
from lightning_caq.network.layers import Layer
from lightning_caq.network.outputs import Outputs
from lightning_caq.utilities.seeding import generator

Call = tuple[Layer, nn.Module, Tensor, Tensor]
"""Layer, module, input and output."""
Factors = tuple[Tensor, Tensor]
Rows = ExactRows | FoldedRows

_SAMPLES = 4  # of a batch, to see whether all go through the same calls


@dataclass(frozen=True)
class Pass:
    """A pass over some samples: the calls of the layers, and the outputs with their graph."""

    calls: list[Call]
    outputs: Outputs

    @classmethod
    def over(cls, model: nn.Module, watched: Mapping[int, Layer], batch: Any) -> Pass:
        """Run a batch, and note the calls of some modules.

        Args:
            model: The network.
            watched: Layer by the identity of its module.
            batch: The batch.
        """
        with recording(model, watched) as calls, torch.enable_grad():
            return cls(calls, run_model(model, batch))


@contextmanager
def recording(model: nn.Module, weights: Mapping[int, Layer]) -> Iterator[list[Call]]:
    """Note layer, module, input and output of every call of the layers, outputs as nodes of the graph."""
    calls: list[Call] = []

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((weights[id(module)], module, inputs.detach(), output))
        return output.clone()  # what follows may work in place

    with watching([m for m in model.modules() if id(m) in weights], hook):
        yield calls


@dataclass(frozen=True)
class Layout:
    """Where samples lie in the calls of the layers, the same for all samples of some shape.

    Attributes:
        calls: Of every call the module, the axis along which samples lie, and the length of one of them.
    """

    calls: tuple[tuple[int, int, int], ...]

    @property
    def axes(self) -> list[int]:
        """The axis of every call."""
        return [axis for _, axis, _ in self.calls]

    def fits(self, calls: Sequence[Call], samples: int) -> bool:
        """Whether so many samples went through the same calls."""
        return len(calls) == len(self.calls) and all(
            id(module) == known and y.shape[axis] == samples * size
            for (_, module, _, y), (known, axis, size) in zip(calls, self.calls, strict=True)
        )


def find_layout(model: nn.Module, watched: Mapping[int, Layer], batch: Any) -> Layout | None:
    """Of every call the axis along which the samples lie, and within it one after the other.

    Two copies of a sample are run, of which only the first has an output that counts: the gradient of a call is zero in
    the half that belongs to the second. Where there is no such half, as where tokens and samples share an axis with the
    tokens first, where samples are routed by their values, or where a batch cannot be cut, rows can be told apart only
    one by one: ``None``.

    Args:
        model: The network.
        watched: Layer by the identity of its module.
        batch: A batch; a few of its samples are run.
    """
    size = batch_size(batch)
    if batch_size(pick(batch, [0, 0])) != 2:
        return None
    runs = []
    for sample in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
        with recording(model, watched) as calls, torch.no_grad():
            run_model(model, pick(batch, [sample]))
        runs.append([(id(module), y.shape) for _, module, _, y in calls])
    double = Pass.over(model, watched, pick(batch, [0, 0]))
    alone = runs[0]
    if any(run != alone for run in runs) or len(alone) != len(double.calls):
        return None
    output = double.outputs.values
    seed = torch.randn(output.shape, generator=generator(0, "axes")).to(output)
    seed[1:] = 0
    gradients = torch.autograd.grad(output, [y for _, _, _, y in double.calls], grad_outputs=seed, allow_unused=True)
    found = []
    for (module, shape), (_, _, _, y), g in zip(alone, double.calls, gradients, strict=True):
        doubled = [d for d in range(y.ndim) if y.shape[d] == 2 * shape[d]]
        apart = [d for d in doubled if g is None or not g.narrow(d, shape[d], shape[d]).any()]
        if not apart:
            return None
        found.append((module, apart[0], shape[apart[0]]))
    return Layout(tuple(found))


def call_factors(layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor, rows: int) -> Factors:
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
    return _by_row(outs, rows), _by_row(columns(layer, module, inputs, size=gradient.shape[2:]), rows)


def _by_row(parts: Tensor, rows: int) -> Tensor:
    """Positions before numbers, shape (rows, groups, positions, numbers).

    A sample may fill several places of the first axis, as its tokens do where they were made a batch of their own.
    """
    several: Tensor = parts.unflatten(0, (rows, -1))
    return several.permute(0, 2, 1, 4, 3).flatten(2, 3)


def put_factors(piece_rows: Rows, place: slice, outputs: range, factors: Sequence[Factors]) -> None:
    """Add what the calls of a layer contribute to some rows, of some of its outputs."""
    if isinstance(piece_rows, WordRows):
        for g, x in factors:
            piece_rows.put(place, g, x)
        return
    parts = [_outer(outputs, *each) for each in factors]
    if isinstance(piece_rows, DenseRows) or len(parts) == 1:
        for g, x in parts:
            piece_rows.put(place, g, x)
    else:  # these have to see all calls together
        gradients, inputs = zip(*parts, strict=True)
        piece_rows.put(place, torch.cat(gradients, 2), torch.cat(inputs, 2))


def _outer(outputs: range, gradients: Tensor, inputs: Tensor) -> Factors:
    """g_t and x_t of one call, of some of the outputs."""
    if gradients.ndim == 4:
        return gradients[..., outputs.start : outputs.stop], inputs
    # A look-up in a table that a linear layer shares: one-hot words take the part of the gradients.
    words = torch.arange(outputs.start, outputs.stop, device=inputs.device)
    return (inputs[..., None] == words)[:, None].to(gradients), gradients[:, None]
