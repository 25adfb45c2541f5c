"""Meaning: whether outputs are scores of classes or values, guessed from what is known of a network and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import OptionError
from lightning_caq.network.observe import LossCall
from lightning_caq.network.outputs import KINDS, Head, Kind, Mask, usual_class_axis
from lightning_caq.utilities.structures import Path, named_tensors

Output = str | Callable[[Any], Any]
"""``"auto"``, ``"classes"``, ``"values"``, or a function that selects among what a network returns."""

_OF_CLASSES = ("logits", "cls", "class", "score", "prob")


@dataclass(frozen=True)
class Evidence:
    """What may tell the meaning of outputs.

    Attributes:
        losses: Loss functions that were seen.
        inputs: Tensors of a batch that are passed to the network, by their path.
        labels: The others.
        names: Names of the arguments that inputs are passed as.
        metrics: Class names of the network's torchmetrics.
    """

    losses: Sequence[LossCall] = ()
    inputs: Mapping[Path, Tensor] | None = None
    labels: Mapping[Path, Tensor] | None = None
    names: Mapping[Path, str] | None = None
    metrics: Sequence[str] = ()


def torchmetrics_of(model: nn.Module) -> list[str]:
    """The metrics among a network's modules, as ``classification.MulticlassAccuracy``; torchmetrics is not needed.

    Example:
        >>> torchmetrics_of(nn.Linear(1, 1))
        []
    """
    found = []
    for module in model.modules():
        where = type(module).__module__.split(".")
        if where[0] == "torchmetrics" and len(where) > 1:
            found.append(f"{where[1]}.{type(module).__name__}")
    return found


def meaning_of(
    path: Path,
    tensor: Tensor,
    axis: int | None,
    *,
    output: Output,
    class_axis: int | None,
    evidence: Evidence,
    alone: bool,
) -> tuple[Head, str]:
    """What one tensor that a network returns means, and why it is taken so.

    Args:
        path: Where it lies in what the network returns.
        tensor: The tensor.
        axis: Where samples lie in it; ``None`` if a batch is one sample.
        output: What the user says.
        class_axis: Where classes lie, if the user says so.
        evidence: What is known.
        alone: Whether it is the only tensor.

    Returns:
        The meaning, its masks but no scale yet; the reason in a few words.

    Raises:
        OptionError: If ``class_axis`` is no axis of the tensor, or the samples lie along it.

    Example:
        >>> known = Evidence(labels={(1,): torch.zeros(4, 3)})
        >>> head, why = meaning_of((), torch.zeros(4, 3), 0, output="auto", class_axis=None, evidence=known, alone=True)
        >>> head.kind, why
        ('values', 'labels are floating-point numbers of its shape')
    """
    if class_axis is not None and (not -tensor.ndim <= class_axis < tensor.ndim or class_axis % tensor.ndim == axis):
        raise OptionError(
            f"class_axis={class_axis} is no axis of classes of an output of shape {list(tensor.shape)}"
            + (f", whose samples lie along axis {axis}" if axis is not None else "")
            + "; give another, or leave it out."
        )
    if class_axis is None:
        axis_of_classes, axis_reason = _class_axis(tensor, axis, evidence)
    else:
        axis_of_classes, axis_reason = class_axis % tensor.ndim, "class_axis says so"
    columns = 1 if axis_of_classes is None else tensor.shape[axis_of_classes]
    kind, why = _kind(path, tensor, axis_of_classes, columns, output, evidence, alone)
    head = Head(path, kind, axis, axis_of_classes)
    reason = f"{why}; classes lie along axis {axis_of_classes}, as {axis_reason}" if axis_reason else why
    samples = 1 if axis is None else tensor.shape[axis]
    positions = tensor.numel() // max(samples * columns, 1)
    return Head(path, kind, axis, axis_of_classes, masks=_masks(tensor, samples, positions, evidence)), (
        reason if head.kind == "classes" else why
    )


def _class_axis(tensor: Tensor, axis: int | None, evidence: Evidence) -> tuple[int | None, str]:
    for call in evidence.losses:
        if call.class_axis is not None and call.inputs.shape == tensor.shape and tensor.ndim > 2:
            return call.class_axis, f"{call.name} takes them"
    for label in (evidence.labels or {}).values():
        if label.is_floating_point() or not tensor.ndim > 2:
            continue
        for d in (tensor.ndim - 1, *range(1, tensor.ndim - 1)):
            if d != axis and label.shape == (*tensor.shape[:d], *tensor.shape[d + 1 :]):
                return d, "labels have the shape that is left without it"
    return usual_class_axis(tensor, axis), ""


def _kind(
    path: Path, tensor: Tensor, axis: int | None, columns: int, output: Output, evidence: Evidence, alone: bool
) -> tuple[Kind, str]:
    if isinstance(output, str) and output in KINDS:
        if columns == 1:
            return "values", "it has a single column"
        return ("classes", "output='classes'") if output == "classes" else ("values", "output='values'")
    if columns == 1:
        return "values", "it has a single column"
    for call in evidence.losses:
        if call.inputs.shape == tensor.shape or (columns in call.inputs.shape[1:] and call.kind == "classes" and alone):
            return call.kind, f"the loss is {call.name}"
    labels = evidence.labels or {}
    for label in labels.values():
        if label.is_floating_point() and label.shape == tensor.shape:
            return "values", "labels are floating-point numbers of its shape"
    named = str(path[-1]).lower() if path and isinstance(path[-1], str) else ""
    if any(part in named for part in _OF_CLASSES):
        return "classes", f"it is named {named!r}"
    if evidence.metrics and alone:
        metric = evidence.metrics[0]
        if metric.startswith("classification."):
            several = "Multilabel" in metric or "Binary" in metric
            return ("values" if several else "classes"), f"{metric.split('.')[1]} is computed of it"
        if metric.startswith(("regression.", "image.")):
            return "values", f"{metric.split('.')[1]} is computed of it"
    positions = tensor.numel() // columns
    for label in labels.values():
        if not label.is_floating_point() and label.numel() == positions and label.dtype != torch.bool:
            return "classes", "labels are whole numbers, one for each of its rows"
    for item in (evidence.inputs or {}).values():
        if item.is_floating_point() and item.ndim > 1 and item.shape == tensor.shape and not labels:
            return "values", "it has the shape of an input"
    if named and not alone:
        return "values", f"it is named {named!r}"
    return "classes", f"it has {columns} columns, and nothing says otherwise"


def _masks(tensor: Tensor, samples: int, positions: int, evidence: Evidence) -> tuple[Mask, ...]:
    if positions < 2 or samples * positions < 2:
        return ()
    found = []
    for path, item in (evidence.inputs or {}).items():
        mask = padding_mask(path, item, (evidence.names or {}).get(path, ""))
        if mask is not None and _fits(item, tensor, samples, positions):
            found.append(mask)
    for path, label in (evidence.labels or {}).items():
        whole = not label.is_floating_point() and label.dtype != torch.bool
        if whole and _fits(label, tensor, samples, positions) and bool((label == -100).any()):
            found.append(Mask(path, "labelled"))
    for path, item in (evidence.inputs or {}).items():
        named = "label" in (evidence.names or {}).get(path, "").lower()
        if named and not item.is_floating_point() and _fits(item, tensor, samples, positions):
            found.append(Mask(path, "labelled"))
    return tuple(found)


def _fits(item: Tensor, tensor: Tensor, samples: int, positions: int) -> bool:
    return item.ndim >= 2 and item.numel() == samples * positions and item.shape[0] in (samples, tensor.shape[0])


def padding_mask(path: Path, tensor: Tensor, name: str) -> Mask | None:
    """What an input says of padding: a mask is 1 where there is something, a padding mask True where there is not.

    Example:
        >>> padding_mask(("attention_mask",), torch.ones(2, 5), "attention_mask").rule
        'nonzero'
        >>> padding_mask((1,), torch.zeros(2, 5, dtype=torch.bool), "src_key_padding_mask").rule
        'zero'
    """
    name = name.lower()
    if tensor.ndim != 2 or "mask" not in name:
        return None
    if "padding" in name or "pad_mask" in name:
        return Mask(path, "zero") if tensor.dtype == torch.bool else None
    if name in ("mask", "attention_mask", "attn_mask", "input_mask", "valid_mask", "token_mask"):
        binary = tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all())
        return Mask(path, "nonzero") if binary and bool((tensor != 0).any()) else None
    return None


def input_padding(evidence: Evidence) -> Mask | None:
    """The padding mask among the inputs, if there is one."""
    for path, tensor in (evidence.inputs or {}).items():
        mask = padding_mask(path, tensor, (evidence.names or {}).get(path, ""))
        if mask is not None:
            return mask
    return None


def tensors_by_use(data: Any, passed: Callable[[Path], bool]) -> tuple[dict[Path, Tensor], dict[Path, Tensor]]:
    """Tensors of a batch that are passed to the network, and the others."""
    every = dict(named_tensors(data))
    return {p: t for p, t in every.items() if passed(p)}, {p: t for p, t in every.items() if not passed(p)}
