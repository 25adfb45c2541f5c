"""Axes of an export that may vary: those that were asked for, or those that the network itself leaves free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_caq.export.onnx_inputs import DynamicShapes, ExampleInputs

NAMES = ("batch", "sequence")  # of the first and the second dimension


def candidate_axes(inputs: ExampleInputs) -> tuple[int, ...]:
    """The axes that are free by default where the network allows it: of inputs by name the second one too.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> candidate_axes(ExampleInputs((), {"text": x}, {"text": x}))
        (0, 1)
        >>> candidate_axes(ExampleInputs((x,), {}, {"text": x}))
        (0,)
    """
    return (0, 1) if inputs.kwargs else (0,)


def traced_shapes(inputs: ExampleInputs, asked: DynamicShapes | None, free: Sequence[int]) -> dict[str, Any]:
    """What torch's exporter is told of the shapes of arguments.

    Args:
        inputs: The arguments.
        asked: Input to dimension to name, as the user gave it.
        free: Dimensions that are free where the network allows it, if nothing was asked for.
    """
    titles = {title for axes in (asked or {}).values() for title in axes.values()}
    dims = {title: torch.export.Dim(title) for title in titles}

    def shape(name: str, tensor: Tensor) -> dict[int, Any]:
        if asked is None:
            return {axis: torch.export.Dim.AUTO for axis in free if axis < tensor.ndim}
        return {axis: dims[title] for axis, title in asked.get(name, {}).items()}

    args, kwargs = inputs.with_tensors(shape)
    return {"args": list(args), "kwargs": kwargs}


def several_samples(inputs: ExampleInputs) -> ExampleInputs:
    """Inputs by name of a single sample twice over: the exporter takes an axis of length 1 for a fixed one.

    Example:
        >>> x = torch.zeros(1, 3)
        >>> several_samples(ExampleInputs((), {"text": x}, {"text": x})).named["text"].shape
        torch.Size([2, 3])
    """
    single = inputs.kwargs and all(x.ndim and len(x) == 1 for x in inputs.named.values())
    return inputs.enlarged({name: {0: NAMES[0]} for name in inputs.named}) if single else inputs


def fix_single_values(graph: Any, program: Any) -> None:
    """Write dimensions that can have one size only, as the trace has shown, as that size.

    Args:
        graph: The ``onnx.GraphProto``, changed in place.
        program: The ``torch.export.ExportedProgram`` that it was made from.
    """
    ranges = {str(symbol): values for symbol, values in program.range_constraints.items()}
    fixed = {symbol: int(values.lower) for symbol, values in ranges.items() if values.lower == values.upper}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]


def free_axes(graph: Any, inputs: ExampleInputs) -> dict[str, dict[int, str]]:
    """Input to dimension to name, of all dimensions that a graph leaves free.

    Every first dimension is the batch. Of second ones the first is the sequence, with those that vary with it; others
    keep the names that the exporter gave them.

    Args:
        graph: The ``onnx.GraphProto``.
        inputs: The arguments.
    """
    axes: dict[str, dict[int, str]] = {}
    sequence = ""
    for value in graph.input:
        dims = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        if value.name not in inputs.named:
            continue
        sequence = sequence or (dims[1] if len(dims) > 1 else "")
        titles = {
            axis: dim if axis and dim != sequence else NAMES[min(axis, 1)] for axis, dim in enumerate(dims) if dim
        }
        if titles:
            axes[value.name] = titles
    return axes
