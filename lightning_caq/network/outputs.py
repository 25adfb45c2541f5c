"""Outputs: what a network gives, as one matrix with a row a sample, and what its numbers mean.

Every floating-point tensor that a network returns is a part of its output, on a scale of its own. ``classes`` are
scores of a distribution over classes, which change what the network says by their divergence; ``values`` are numbers,
which do so by their squared error relative to their own variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_caq.utilities.structures import Path, is_object, named_tensors, path_name

Kind = Literal["classes", "values"]
KINDS: tuple[Kind, ...] = ("classes", "values")


@dataclass(frozen=True)
class Mask:
    """What tells which positions of an output count: a tensor of the batch, of the shape (samples, positions).

    Attributes:
        path: Where it lies in the batch.
        rule: ``"nonzero"`` or ``"zero"`` where positions count, or ``"labelled"`` where it is not −100.
    """

    path: Path
    rule: Literal["nonzero", "zero", "labelled"]

    def keep(self, tensor: Tensor) -> Tensor:
        """Whether each position counts.

        Example:
            >>> Mask(("labels",), "labelled").keep(torch.tensor([[3, -100]]))
            tensor([[ True, False]])
        """
        if self.rule == "labelled":
            return tensor.ne(-100)
        return tensor.ne(0) if self.rule == "nonzero" else tensor.eq(0)


@dataclass(frozen=True)
class Head:
    """What one tensor that a network returns means.

    Attributes:
        path: Where it lies in what the network returns.
        kind: ``"classes"`` or ``"values"``.
        sample_axis: The axis along which samples lie, alone or each with its rows one after the other; ``None`` where a
            batch is one sample.
        class_axis: The axis of classes, or of columns of values; ``None`` where the samples lie along the only one.
        mean: Mean of each column of values, shape (columns,) or (1,); ``None`` where values are taken as they are.
        std: Standard deviation of each column, likewise.
        unit: What one unit of distance is, so that no tensor outweighs the others; 1 where there is but one.
        masks: What leaves positions out.
    """

    path: Path
    kind: Kind
    sample_axis: int | None = 0
    class_axis: int | None = -1
    mean: Tensor | None = None
    std: Tensor | None = None
    unit: float = 1.0
    masks: tuple[Mask, ...] = ()

    @property
    def name(self) -> str:
        """Where the tensor lies, in words."""
        return path_name(self.path) or "output"

    def rows(self, tensor: Tensor, samples: int) -> Tensor:
        """The tensor as it was returned, as rows, shape (samples, positions, columns)."""
        if self.sample_axis is None:
            moved = tensor if self.class_axis is None else tensor.movedim(self.class_axis, -1)
            return moved.reshape(1, -1, 1 if self.class_axis is None else moved.shape[-1])
        if self.class_axis is None:
            return tensor.movedim(self.sample_axis, 0).reshape(samples, -1, 1)
        sample, classes = self.sample_axis % tensor.ndim, self.class_axis % tensor.ndim
        if (sample, classes) != (0, tensor.ndim - 1):
            tensor = tensor.movedim((sample, classes), (0, -1))
        return tensor.reshape(samples, -1, tensor.shape[-1])

    def standardised(self, rows: Tensor) -> Tensor:
        """Rows on the scale that distances are taken on."""
        if self.mean is not None and self.std is not None:
            rows = (rows - self.mean.to(rows)) / self.std.to(rows)
        return rows if self.unit == 1 else rows / self.unit


@dataclass(frozen=True)
class Part:
    """The columns of ``Outputs.values`` that one tensor fills, (positions, columns) one after the other.

    Attributes:
        kind: ``"classes"`` or ``"values"``.
        start: The first of them.
        positions: Rows of one sample, such as tokens or pixels.
        columns: Classes, or values.
        unit: What the tensor was divided by.
        weights: Of each position its share in the mean, shape (samples, positions), zero where it is left out; ``None``
            where all count alike.
    """

    kind: Kind
    start: int
    positions: int
    columns: int
    unit: float = 1.0
    weights: Tensor | None = None

    @property
    def stop(self) -> int:
        """The column behind the last."""
        return self.start + self.positions * self.columns

    @property
    def by_distance(self) -> bool:
        """Whether the objective is a squared distance: of values, and of one column, which is no distribution."""
        return self.kind == "values" or self.columns == 1

    def rows(self, values: Tensor) -> Tensor:
        """Its rows among the values, shape (samples, positions, columns), in its own unit."""
        rows: Tensor = values[:, self.start : self.stop].unflatten(1, (self.positions, self.columns))
        return rows if self.unit == 1 else rows * self.unit

    def shares(self, samples: int) -> Tensor:
        """Share of each position in its sample's mean, shape (samples, positions), float64, on the CPU."""
        if self.weights is None:
            return torch.full((samples, self.positions), 1 / self.positions, dtype=torch.float64)
        return self.weights.double().cpu()


@dataclass(frozen=True)
class Outputs:
    """What a network gives for a batch.

    Attributes:
        values: All tensors beside each other, shape (samples, numbers).
        parts: What they are.
    """

    values: Tensor
    parts: tuple[Part, ...]

    def with_values(self, values: Tensor) -> Outputs:
        """Other numbers of the same meaning."""
        return replace(self, values=values)


def read_outputs(heads: Sequence[Head], returned: Any, samples: int, batch: Any = None) -> Outputs:
    """What a network returned, as one matrix.

    Args:
        heads: What it means.
        returned: What the network returned.
        samples: Number of samples.
        batch: The batch, for masks.

    Example:
        >>> heads = (Head(("a",), "classes"), Head(("b",), "values"))
        >>> found = read_outputs(heads, {"a": torch.zeros(2, 3), "b": torch.ones(2, 4, 1)}, 2)
        >>> found.values.shape, [(p.start, p.positions, p.columns) for p in found.parts]
        (torch.Size([2, 7]), [(0, 1, 3), (3, 4, 1)])
    """
    tensors = dict(named_tensors(returned))
    filled = dict(named_tensors(batch)) if any(head.masks for head in heads) else {}
    values, parts, start = [], [], 0
    for head in heads:
        rows = head.standardised(head.rows(tensors[head.path], samples))
        keep = _kept(head, filled, rows)
        weights = None
        if keep is not None:
            rows = rows.masked_fill(~keep[:, :, None], 0.0)
            weights = keep.double() / keep.double().sum(1, keepdim=True).clamp_min(1)
        parts.append(Part(head.kind, start, rows.shape[1], rows.shape[2], head.unit, weights))
        values.append(rows.flatten(1))
        start = parts[-1].stop
    return Outputs(values[0] if len(values) == 1 else torch.cat(values, 1), tuple(parts))


def _kept(head: Head, batch: Mapping[Path, Tensor], rows: Tensor) -> Tensor | None:
    """Which positions count, shape (samples, positions); all, if the masks are of other shapes or leave out all."""
    keep = None
    for mask in head.masks:
        tensor = batch.get(mask.path)
        if tensor is None or tensor.numel() != rows.shape[0] * rows.shape[1]:
            continue
        kept = mask.keep(tensor).reshape(rows.shape[:2]).to(rows.device)
        keep = kept if keep is None else keep & kept
    return None if keep is None or bool(keep.all()) or not bool(keep.any()) else keep


def divergence(target: Outputs, outputs: Outputs) -> Tensor:
    """How much present outputs differ from float ones: mean over samples of ``divergences``, a scalar with its graph.

    Example:
        >>> part = (Part("classes", 0, 1, 2),)
        >>> before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(float(divergence(Outputs(before, part), Outputs(after, part))), 4)
        0.1201
    """
    return divergences(target, outputs).mean()


def divergences(target: Outputs, outputs: Outputs) -> Tensor:
    """How much present outputs of each sample differ from float ones, shape (samples,).

    The sum over tensors of KL(p ‖ q) of the softmax distributions, nat, or of ½ the mean over columns of the squared
    difference, in units of the columns' own variance; each a mean over the positions that count.
    """
    losses = []
    for part in target.parts:
        before, after = part.rows(target.values), part.rows(outputs.values)
        if part.by_distance:
            loss = 0.5 * (after - before).square().mean(2)
        else:
            # Half precision has too few digits for a small difference.
            dtype = torch.promote_types(after.dtype, torch.float32)
            p, q = F.log_softmax(before.to(dtype), 2), F.log_softmax(after.to(dtype), 2)
            loss = (p.exp() * (p - q)).sum(2)
        losses.append(loss.mean(1) if part.weights is None else (loss * part.weights.to(loss)).sum(1))
    return losses[0] if len(losses) == 1 else torch.stack([x.to(losses[0].dtype) for x in losses]).sum(0)


def opened(returned: Any) -> Any:
    """What a network returned, an object of an unknown class as a dict of its attributes.

    Example:
        >>> from types import SimpleNamespace
        >>> opened(SimpleNamespace(logits=5)), opened((1, 2))
        ({'logits': 5}, (1, 2))
    """
    return dict(vars(returned)) if is_object(returned) and hasattr(returned, "__dict__") else returned


def output_tensors(returned: Any) -> list[tuple[Path, Tensor]]:
    """The tensors of what a network returned that can be outputs: floating-point ones that are no single number.

    Example:
        >>> [path for path, _ in output_tensors({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)})]
        [('logits',)]
    """
    return [(path, t) for path, t in named_tensors(returned) if t.is_floating_point() and t.ndim and t.numel()]


def usual_class_axis(tensor: Tensor, sample_axis: int | None = 0) -> int | None:
    """Where classes lie if nothing else is known: along the last axis, along the second of four or more, as in images.

    Example:
        >>> [usual_class_axis(torch.zeros(shape)) for shape in ((2, 5, 3), (2, 3, 8, 8), (2,))]
        [2, 1, None]
    """
    if tensor.ndim == 1:
        return None
    axis = 1 if tensor.ndim >= 4 else tensor.ndim - 1
    return axis if axis != sample_axis else tensor.ndim - 1 - (sample_axis == tensor.ndim - 1)


def default_heads(returned: Any, samples: int) -> tuple[Head, ...]:
    """What outputs mean if nothing is known but their shapes: scores of classes, or values where there is one column.

    Samples are taken to lie along the first axis, or along the second of three, as (tokens, samples, classes). Where
    they lie along neither in any of the tensors, the batch is taken as one sample.

    Example:
        >>> [(h.kind, h.sample_axis) for h in default_heads((torch.zeros(6, 4, 3), torch.zeros(4, 1)), 4)]
        [('classes', 1), ('values', 0)]
    """
    heads = []
    for path, tensor in output_tensors(returned):
        axis: int | None = 0
        if len(tensor) % max(samples, 1):
            if not (tensor.ndim == 3 and tensor.shape[1] == samples):
                continue
            axis = 1
        classes = usual_class_axis(tensor, axis)
        columns = 1 if classes is None else tensor.shape[classes]
        heads.append(Head(path, "classes" if columns > 1 else "values", axis, classes))
    if heads or samples == 1:
        return tuple(heads)
    return tuple(replace(head, sample_axis=None) for head in default_heads(returned, 1))


OutputFunction = Callable[[Any], Any]
"""What a user selects of what a network returns: a tensor, or any structure of tensors."""
