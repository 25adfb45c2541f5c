"""Views of ONNX graphs: who makes a tensor, who takes it, and which of them are constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np


class GraphView:
    """Look-ups in a graph that does not change meanwhile.

    Args:
        graph: The ``onnx.GraphProto``.

    Attributes:
        producers: Tensor to the node that makes it.
        takers: Tensor to the nodes that take it, once for each time.
        outputs: Names of the graph's outputs.

    Example:
        >>> import pytest
        >>> onnx = pytest.importorskip("onnx")
        >>> x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
        >>> graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "net", [x], [y])
        >>> GraphView(graph).producers["y"].op_type, GraphView(graph).only_taker("x").op_type
        ('Relu', 'Relu')
    """

    def __init__(self, graph: Any) -> None:
        self.producers: dict[str, Any] = {name: node for node in graph.node for name in node.output if name}
        self.takers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.takers[name].append(node)
        self.outputs = {x.name for x in graph.output}
        self._constants = {x.name: x for x in graph.initializer}
        self._ranks = {
            x.name: len(x.type.tensor_type.shape.dim)
            for x in (*graph.value_info, *graph.input, *graph.output)
            if x.type.tensor_type.HasField("shape")
        }

    def only_taker(self, name: str) -> Any | None:
        """The node that takes a tensor, if it is taken nowhere else and is no output of the graph."""
        takers = self.takers.get(name, [])
        return takers[0] if len(takers) == 1 and name not in self.outputs else None

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant; ``None`` for what is computed or handed over."""
        stored = self._constants.get(name)
        return None if stored is None else import_module("onnx").numpy_helper.to_array(stored)

    def rank(self, name: str) -> int | None:
        """Number of dimensions, where it is known."""
        return self._ranks.get(name)


def attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute of a node, or the value that it has by default.

    Example:
        >>> import pytest
        >>> onnx = pytest.importorskip("onnx")
        >>> attribute(onnx.helper.make_node("Concat", ["x"], ["y"], axis=1), "axis", 0)
        1
    """
    helper = import_module("onnx").helper
    return next((helper.get_attribute_value(x) for x in node.attribute if x.name == name), default)


def replace_nodes(graph: Any, nodes: Sequence[Any]) -> None:
    """Give a graph other nodes, and take away the constants that none of them needs.

    Args:
        graph: The ``onnx.GraphProto``, changed in place.
        nodes: All nodes, each behind those whose outputs it takes.
    """
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input} | {x.name for x in graph.output}
    constants = [x for x in graph.initializer if x.name in used]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
