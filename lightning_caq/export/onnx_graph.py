"""ONNX graphs: a weight that is a graph input becomes integers and a DequantizeLinear node."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_caq.export.integers import Integers


def dequantize_input(graph: Any, name: str, stored: Integers) -> None:
    """Replace an input of an ONNX graph by nodes that compute it from integers.

    The integers are dequantized in float32 and then cast to the input's own type, as in PyTorch.

    Args:
        graph: The ``onnx.GraphProto``, changed in place.
        name: The input; a value of that name stays, now computed.
        stored: The integers, scales and zero points.

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
    parts = [f"{name}.codes", f"{name}.scale", f"{name}.zero_point"]
    scale = onnx.numpy_helper.from_array(stored.scale.cpu().numpy(), parts[1])
    graph.initializer.extend(
        [_integers(parts[0], stored.values, stored.type), scale, _integers(parts[2], stored.zero_point, stored.type)]
    )
    result = name if wanted == float32 else f"{name}.float32"
    nodes = [helper.make_node("DequantizeLinear", parts, [result], f"{name}.dequantize", axis=stored.axis)]
    if wanted != float32:
        nodes.append(helper.make_node("Cast", [result], [name], f"{name}.cast", to=wanted))
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _integers(name: str, values: Tensor, kind: str) -> Any:
    onnx = import_module("onnx")
    flat = values.cpu().flatten()
    if kind == "uint4":  # two to a byte, the first in the lower half
        flat = F.pad(flat, (0, flat.numel() % 2))
        raw = (flat[::2] | flat[1::2] << 4).numpy().astype("uint8").tobytes()
    else:
        raw = flat.numpy().astype(kind).tobytes()
    return onnx.helper.make_tensor(name, getattr(onnx.TensorProto, kind.upper()), values.shape, raw, raw=True)
