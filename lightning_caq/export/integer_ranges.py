"""Ranges of tensors that the pipeline gave no grid, such as sums of residual blocks: observed where they occur."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_caq.quantizers.grids.activations import InputGrid, fit_input_grid
from lightning_caq.utilities.seeding import generator

_VALUES = 2**17  # kept of each tensor, 0.5 MB
_SAMPLES = 4  # that run at a time: what is observed is held in memory until a few values of it are drawn


def observed_grids(proto: Any, tensors: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, InputGrid]:
    """Grids of 8 bits for tensors of a graph, each with close to the least squared error on what is observed.

    Args:
        proto: The ``onnx.ModelProto``, inputs of layers rounded; left as it is.
        tensors: Names of tensors of it.
        inputs: What to run it on, by name.

    Returns:
        Name to grid.
    """
    if not tensors:
        return {}
    onnx = import_module("onnx")
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    present = {x.name for x in watched.graph.output}
    kind = onnx.TensorProto.FLOAT
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name in dict.fromkeys(tensors) if name not in present
    )
    session = import_module("onnxruntime").InferenceSession(
        watched.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    kept: dict[str, list[Tensor]] = {name: [] for name in tensors}
    parts = list(_parts(proto, inputs))
    for part in parts:
        for name, values in zip(kept, session.run(list(kept), part), strict=True):
            kept[name].append(_drawn(name, torch.from_numpy(values).flatten(), _VALUES // len(parts)))
    return {name: fit_input_grid(torch.cat(values), bits=8) for name, values in kept.items()}


def _parts(proto: Any, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """The inputs, a few samples at a time where the graph leaves their number free."""
    shapes = {x.name: x.type.tensor_type.shape.dim for x in proto.graph.input}
    arrays = {name: x.detach().cpu() for name, x in inputs.items() if name in shapes}
    free = all(shapes[name] and shapes[name][0].HasField("dim_param") for name in arrays)
    counts = {len(x) for x in arrays.values() if x.ndim}
    step = _SAMPLES if free and len(counts) == 1 else max(counts, default=1)
    for start in range(0, max(counts, default=1), step):
        yield {name: (x[start : start + step] if x.ndim else x).numpy() for name, x in arrays.items()}


def _drawn(name: str, values: Tensor, count: int) -> Tensor:
    """Some of the values, the smallest and the largest among them."""
    if len(values) <= count:
        return values
    places = torch.randint(len(values), (count,), generator=generator(0, f"range/{name}"))
    return torch.cat([values[places], values.amin()[None], values.amax()[None]])
