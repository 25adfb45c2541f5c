"""ONNX graphs: what stands for a quantized weight or a rounded input becomes the nodes that runtimes know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_caq.errors import ExportError
from lightning_caq.export.integers import Integers
from lightning_caq.quantizers.grids.activations import InputGrid

DOMAIN, ROUND_INPUT = "lightning_caq", "RoundInput"
_NODES = {"DequantizeLinear": "dequantize", "Reshape": "reshape", "Cast": "cast"}


def name_dimensions(graph: Any, dimensions: Mapping[str, Mapping[int, str]]) -> None:
    """Give dimensions of inputs, and wherever else they occur, the names that the user gave them.

    Args:
        graph: The ``onnx.GraphProto``, changed in place.
        dimensions: Input to dimension to name.

    Raises:
        ExportError: If the graph fixes one of them.
    """
    inputs = {x.name: x.type.tensor_type.shape.dim for x in graph.input}
    names: dict[str, str] = {}
    for name, axes in dimensions.items():
        for axis, title in axes.items():
            if inputs[name][axis].HasField("dim_value"):
                raise ExportError(
                    f"Dimension {axis} of the input {name!r} cannot vary: the network fixes it at "
                    f"{inputs[name][axis].dim_value}. Leave it out of dynamic_shapes."
                )
            names[inputs[name][axis].dim_param] = title
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def dequantize_input(graph: Any, name: str, stored: Integers, *, fused: bool = False) -> None:
    """Replace an input of an ONNX graph by nodes that compute it from integers.

    The integers are dequantized in float32 and then cast to the input's own type, as in PyTorch. A matrix that is
    multiplied by is then given its own shape anew, which keeps ONNX Runtime from fusing both into one operator that
    rounds the other factor to 8 bits.

    Args:
        graph: The ``onnx.GraphProto``, changed in place.
        name: The input; a value of that name stays, now computed.
        stored: The integers, scales and zero points.
        fused: Let ONNX Runtime fuse a matrix with its product; blocks are laid out as that needs it.

    Example:
        >>> import pytest, torch
        >>> onnx = pytest.importorskip("onnx")
        >>> weight = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [1, 2])
        >>> graph = onnx.helper.make_graph([], "net", [weight], [weight])
        >>> two = torch.tensor([[1, 2]], dtype=torch.int32)
        >>> zero = torch.tensor(1, dtype=torch.int32)
        >>> dequantize_input(graph, "w", Integers("uint4", two, torch.tensor(0.5), zero, axis=0, doubled=False))
        >>> [x.name for x in graph.input], [node.op_type for node in graph.node]
        ([], ['DequantizeLinear'])
    """
    onnx = import_module("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    index = next(i for i, x in enumerate(graph.input) if x.name == name)
    wanted = graph.input[index].type.tensor_type.elem_type
    del graph.input[index]
    takers = [node for node in graph.node if name in node.input]
    value, shape = name, stored.shape
    if stored.values.ndim == 2 and not shape:
        if fused and stored.group_size is not None and takers and all(map(_transposes, takers)):
            stored, value = _transposed(stored), _drop(graph, takers)
        elif not fused and any(node.op_type != "Gather" for node in takers):
            shape = tuple(stored.values.shape)
    parts = [f"{name}.codes", f"{name}.scale", f"{name}.zero_point"]
    graph.initializer.extend(
        [
            _integers(parts[0], stored.values, stored.type),
            _number(parts[1], stored.scale),
            _integers(parts[2], stored.zero_point, stored.type),
        ]
    )
    blocks = {} if stored.group_size is None else {"block_size": stored.group_size}
    steps = [("DequantizeLinear", parts[1:], {"axis": stored.axis, **blocks})]
    if shape:
        graph.initializer.append(helper.make_tensor(f"{name}.shape", onnx.TensorProto.INT64, [len(shape)], shape))
        steps.append(("Reshape", [f"{name}.shape"], {}))
    if wanted != float32:
        steps.append(("Cast", [], {"to": wanted}))
    nodes, before = [], parts[0]
    for i, (kind, others, attributes) in enumerate(steps, 1):
        result = value if i == len(steps) else f"{name}.{kind.lower()}"
        nodes.append(helper.make_node(kind, [before, *others], [result], f"{name}.{_NODES[kind]}", **attributes))
        before = result
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _transposes(node: Any) -> bool:
    """Whether a node transposes a matrix."""
    return node.op_type == "Transpose" and [list(x.ints) for x in node.attribute] == [[1, 0]]


def _drop(graph: Any, nodes: Sequence[Any]) -> str:
    """Take nodes that all compute the same out of a graph; the name that their result has from now on."""
    results = [str(node.output[0]) for node in nodes]
    for node in nodes:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [results[0] if x in results else x for x in node.input]
    return results[0]


def _transposed(stored: Integers) -> Integers:
    """A matrix with its dimensions exchanged."""
    values, scale, zero_point = (x.T.contiguous() for x in (stored.values, stored.scale, stored.zero_point))
    return replace(stored, values=values, scale=scale, zero_point=zero_point, axis=1 - stored.axis)


def quantize_rounded(model: Any) -> None:
    """Replace every node that marks the rounding of an input by QuantizeLinear and DequantizeLinear.

    A marking node has the attributes of an ``InputGrid``. All are quantized in uint8, those of fewer bits after a Clip
    to their range: ONNX Runtime moves uint4 values past operators, such as MaxPool, that do not take them.

    Args:
        model: The ``onnx.ModelProto``, changed in place.

    Example:
        >>> import pytest
        >>> onnx = pytest.importorskip("onnx")
        >>> x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
        >>> mark = onnx.helper.make_node(ROUND_INPUT, ["x"], ["y"], domain=DOMAIN, bits=3, scale=0.5, zero_point=0)
        >>> model = onnx.helper.make_model(onnx.helper.make_graph([mark], "net", [x], [y]))
        >>> quantize_rounded(model)
        >>> [node.op_type for node in model.graph.node]
        ['Clip', 'QuantizeLinear', 'DequantizeLinear']
    """
    helper = import_module("onnx").helper
    graph, nodes = model.graph, []
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, ROUND_INPUT):
            grid = InputGrid(**{x.name: helper.get_attribute_value(x) for x in node.attribute})
            nodes += _rounding(graph, node.input[0], node.output[0], grid)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    domains = [x for x in model.opset_import if x.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(domains)


def _rounding(graph: Any, value: str, name: str, grid: InputGrid) -> list[Any]:
    """Nodes that round ``value`` to a grid and call the result ``name``."""
    make = import_module("onnx").helper.make_node
    scale, zero = torch.tensor(grid.scale), torch.tensor(grid.zero_point, dtype=torch.int32)
    parts = [f"{name}.scale", f"{name}.zero_point"]
    graph.initializer.extend([_number(parts[0], scale), _integers(parts[1], zero, "uint8")])
    nodes = []
    if grid.bits < 8:
        ends = [f"{name}.low", f"{name}.high"]
        graph.initializer.extend(_number(end, code * scale) for end, code in zip(ends, grid.codes, strict=True))
        nodes.append(make("Clip", [value, *ends], [f"{name}.clipped"], f"{name}.clip"))
        value = f"{name}.clipped"
    nodes.append(make("QuantizeLinear", [value, *parts], [f"{name}.codes"], f"{name}.quantize"))
    nodes.append(make("DequantizeLinear", [f"{name}.codes", *parts], [name], f"{name}.dequantize"))
    return nodes


def _number(name: str, value: Tensor) -> Any:
    return import_module("onnx").numpy_helper.from_array(value.cpu().numpy(), name)


def _integers(name: str, values: Tensor, kind: str) -> Any:
    onnx = import_module("onnx")
    flat = values.cpu().flatten()
    if kind == "uint4":  # two to a byte, the first in the lower half
        flat = F.pad(flat, (0, flat.numel() % 2))
        raw = (flat[::2] | flat[1::2] << 4).numpy().astype("uint8").tobytes()
    else:
        raw = flat.numpy().astype(kind).tobytes()
    return onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind.upper()), values.shape, raw, raw=True)
