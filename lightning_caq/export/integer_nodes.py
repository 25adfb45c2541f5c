"""Integer nodes: the graph that stock runtimes execute in integers, written by a scheme.

Integer operators stand between DequantizeLinear and QuantizeLinear nodes, the pattern (QDQ) that ONNX Runtime and
OpenVINO turn into QLinearConv, QGemm and the like. What only moves or clamps values works on the codes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from lightning_caq.export.integer_layers import IntegerLayer
from lightning_caq.export.integer_scheme import Scheme, moves
from lightning_caq.export.integer_tables import IntegerTable
from lightning_caq.export.integer_view import GraphView, replace_nodes
from lightning_caq.export.onnx_graph import ROUND_INPUT
from lightning_caq.quantizers.grids.activations import InputGrid


@dataclass(frozen=True)
class _Codes:
    """A tensor in integers.

    Attributes:
        name: The tensor that holds its codes.
        grid: Its grid.
        of: The tensor that the grid's scale and zero point are named after.
    """

    name: str
    grid: InputGrid
    of: str

    @property
    def parts(self) -> list[str]:
        return [f"{self.of}.scale", f"{self.of}.zero_point"]


def write_integer_nodes(graph: Any, scheme: Scheme, tables: Mapping[str, IntegerTable], opset: int) -> dict[str, str]:
    """Turn a graph into one that computes in integers.

    Args:
        graph: The graph, normalizations taken into the layers, and the inputs of layers marked; changed in place.
        scheme: What to compute in integers, with no grid left open.
        tables: The tables to look up as codes, by name of the node.
        opset: Version of ONNX's operators; types of 4 bits need 21.

    Returns:
        Integer type of the weight of every integer layer and table by its key.
    """
    writer = _Writer(graph, scheme, tables, opset)
    for node in list(graph.node):
        writer.write(node)
    for name in (x.name for x in graph.output):
        writer.as_float(name)
    replace_nodes(graph, writer.nodes)
    return writer.types


class _Writer:
    """Nodes and constants as they are written, and which tensors have codes."""

    def __init__(self, graph: Any, scheme: Scheme, tables: Mapping[str, IntegerTable], opset: int) -> None:
        self.onnx = import_module("onnx")
        self.graph, self.view, self.scheme, self.opset = graph, GraphView(graph), scheme, opset
        self.tables = tables
        self.nodes: list[Any] = []
        self.types: dict[str, str] = {}
        self._codes: dict[str, _Codes] = {}  # of tensors that are made in integers
        self._rounded: dict[str, _Codes] = {}  # of tensors that are made in floating point
        self._floats: set[str] = set()
        self._constants: set[str] = set()

    def write(self, node: Any) -> None:
        """Write what takes the place of a node."""
        first = node.input[0] if node.input else ""
        if node.name in self.scheme.layers:
            self._layer(node, self.scheme.layers[node.name])
        elif node.name in self.tables:
            self._table(node, self.tables[node.name])
        elif node.name in self.scheme.combining:
            self._between(node, [self._dequantized(name, f"{node.name}.{i}") for i, name in enumerate(node.input)])
        elif node.op_type == ROUND_INPUT:
            self._mark(node)
        elif first in self._codes and node.op_type == "Shape":
            self._add("Shape", [self._codes[first].name], node.output[0], like=node)
        elif first in self._codes and moves(self.view, node):
            self._on_codes(node, self._codes[first])
        else:
            for name in node.input:
                self.as_float(name)
            self.nodes.append(node)

    def as_float(self, name: str) -> None:
        """Let a tensor that is made in integers be had in floating point too."""
        if name in self._codes and name not in self._floats:
            self._floats.add(name)
            codes = self._codes[name]
            self._add("DequantizeLinear", [codes.name, *codes.parts], name)

    def _layer(self, node: Any, layer: IntegerLayer) -> None:
        """A convolution or a product, with whole weights and a whole bias."""
        codes = self._codes_of(node.input[0])
        layer = layer.with_bias_for(codes.grid.scale)
        inputs = [self._dequantized(node.input[0], f"{node.name}.0"), self._weight(layer)]
        if layer.bias is not None:
            inputs.append(self._bias(layer, codes.grid.scale))
        self._between(node, inputs)

    def _between(self, node: Any, inputs: list[str]) -> None:
        """An operator on dequantized inputs; its output is quantized if it is to be had in integers."""
        name = node.output[0]
        grid = self.scheme.grids.get(name)
        self._add(node.op_type, inputs, name if grid is None else f"{name}.real", like=node)
        if grid is not None:
            self._codes[name] = self._quantized(f"{name}.real", name, grid)

    def _mark(self, node: Any) -> None:
        name, source = node.output[0], node.input[0]
        if source in self._codes:
            self._codes[name] = self._codes[source]
            return
        if source not in self._rounded:
            self._rounded[source] = self._quantized(source, name, self.scheme.grids[name])
        self._codes[name] = self._rounded[source]

    def _codes_of(self, name: str) -> _Codes:
        return self._codes[name] if name in self._codes else self._rounded[name]

    def _quantized(self, source: str, name: str, grid: InputGrid) -> _Codes:
        codes = _Codes(f"{name}.codes", grid, name)
        self._constant(codes.parts[0], np.float32(grid.scale))
        self._constant(codes.parts[1], np.uint8(grid.zero_point))
        self._add("QuantizeLinear", [source, *codes.parts], codes.name)
        return codes

    def _dequantized(self, name: str, use: str) -> str:
        """The values of a tensor for one use; nodes with a taker each are what runtimes look for."""
        codes = self._codes_of(name)
        return self._add("DequantizeLinear", [codes.name, *codes.parts], f"{use}.input")

    def _on_codes(self, node: Any, codes: _Codes) -> None:
        """What moves or clamps values does so with codes."""
        name = f"{node.output[0]}.codes"
        if node.op_type in ("Relu", "Clip"):
            ends = self._ends(node, codes.grid)
            if ends == (0, 255):
                name = codes.name
            else:
                parts = [self._constant(f"{name}.{i}", np.uint8(end)) for i, end in enumerate(ends)]
                self._add("Clip", [codes.name, *parts], name)
            self._codes[node.output[0]] = _Codes(name, codes.grid, codes.of)
            return
        inputs = [codes.name, *node.input[1:]]
        if node.op_type == "Pad":
            inputs[2:3] = [codes.parts[1]]
        new = self._like(node)
        new.input.extend(inputs)
        new.output.extend(f"{output}.codes" for output in node.output)
        self.nodes.append(new)
        self._codes |= {output: _Codes(f"{output}.codes", codes.grid, codes.of) for output in node.output}

    def _ends(self, node: Any, grid: InputGrid) -> tuple[int, int]:
        """The codes that a clamp clamps to."""
        if node.op_type == "Relu":
            return grid.zero_point, 255

        def code(end: np.ndarray) -> int:
            return int(np.clip(np.rint(np.float32(end) / np.float32(grid.scale)) + grid.zero_point, 0, 255))

        names = [*node.input[1:], "", ""][:2]
        ends = [self.view.constant(name) if name else None for name in names]
        low, high = (d if end is None else code(end) for end, d in zip(ends, (0, 255), strict=True))
        return low, high

    def _table(self, node: Any, table: IntegerTable) -> None:
        """A look-up of rows: their codes and their scales, multiplied."""
        name, rows, output = table.key, node.input[1], node.output[0]
        if name not in self.types:
            self._whole(name, table.codes, axis=0)
            self._constant(f"{name}.scale", table.scale[:, None])
        self._add("Gather", [f"{name}.codes", rows], f"{output}.codes", axis=0)
        self._add("Gather", [f"{name}.scale", rows], f"{output}.scale", axis=0)
        self._add("Cast", [f"{output}.codes"], f"{output}.steps", to=self.onnx.TensorProto.FLOAT)
        self._add("Mul", [f"{output}.steps", f"{output}.scale"], output)

    def _weight(self, layer: IntegerLayer) -> str:
        """The weight as it is dequantized."""
        name = layer.key if layer.key not in self.types else f"{layer.key}.{layer.node.name}"
        codes = self._whole(name, layer.codes, layer.axis)
        scale = self._constant(f"{name}.scale", layer.scale)
        zero = self._constant(f"{name}.zero_point", np.zeros(len(layer.scale), np.int8))
        return self._add("DequantizeLinear", [codes, scale, zero], f"{name}.values", axis=layer.axis)

    def _whole(self, name: str, codes: np.ndarray, axis: int) -> str:
        """Codes as signed bytes: stored in 4 bits where these suffice, which are widened as a file is read."""
        along = [-1 if d == axis else 1 for d in range(codes.ndim)]
        others = tuple(d for d in range(codes.ndim) if d != axis)
        low = np.minimum(codes.min(others, initial=0), 0).reshape(along)
        few = self.opset >= 21 and int((codes - low).max(initial=0)) <= 15
        self.types[name] = "uint4" if few else "int8"
        if not few:
            return self._constant(f"{name}.codes", codes.astype(np.int8))
        kinds = self.onnx.TensorProto
        self._four_bits(f"{name}.codes.stored", codes - low)
        self._constant(f"{name}.codes.shift", (-low).astype(np.int32))
        self._add("Cast", [f"{name}.codes.stored"], f"{name}.codes.wide", to=kinds.INT32)
        self._add("Sub", [f"{name}.codes.wide", f"{name}.codes.shift"], f"{name}.codes.signed")
        return self._add("Cast", [f"{name}.codes.signed"], f"{name}.codes", to=kinds.INT8)

    def _bias(self, layer: IntegerLayer, step: float) -> str:
        """The bias as a number of steps of the layer's products."""
        assert layer.bias is not None
        name = f"{layer.output}.bias"
        scale = (layer.scale * np.float32(step)).astype(np.float32)
        steps = np.rint(layer.bias / scale.astype(np.float64)).astype(np.int32)
        parts = [
            self._constant(f"{name}.codes", steps),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero_point", np.zeros(len(steps), np.int32)),
        ]
        return self._add("DequantizeLinear", parts, f"{name}.values", axis=0)

    def _four_bits(self, name: str, codes: np.ndarray) -> None:
        flat = np.append(codes.flatten(), [0] * (codes.size % 2)).astype(np.uint8)
        raw = (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
        kind = self.onnx.TensorProto.UINT4
        self.graph.initializer.append(self.onnx.helper.make_tensor(name, kind, codes.shape, raw, raw=True))

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, kind: str, inputs: list[str], output: str, *, like: Any = None, **attributes: Any) -> str:
        """Write a node, of the attributes of another one perhaps; its only output."""
        node = self.onnx.helper.make_node(kind, inputs, [output], f"{output}.node", **attributes)
        if like is not None:
            node.name = like.name
            node.attribute.extend(like.attribute)
        self.nodes.append(node)
        return output

    @staticmethod
    def _like(node: Any) -> Any:
        new = type(node)()
        new.CopyFrom(node)
        del new.input[:], new.output[:]
        return new
