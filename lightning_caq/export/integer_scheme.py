"""Schemes: which tensors of a graph are integers, and on which grids.

The inputs of layers have grids already. A tensor between layers is an integer too if what makes it has an integer
kernel and what takes it leads to a layer: sums of residual blocks, products, concatenations, averages. What only moves
or clamps values, such as MaxPool, Reshape and ReLU, works on codes as they are: rounding commutes with it, since it is
monotone. Grids of sums and the like are left open, for the ranges that are then observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from lightning_caq.export.integer_layers import IntegerLayer
from lightning_caq.export.integer_view import GraphView, attribute
from lightning_caq.export.onnx_graph import ROUND_INPUT
from lightning_caq.quantizers.grids.activations import InputGrid

CLAMPS = frozenset({"Relu", "Clip"})
MOVES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity", "Split"}
)
COMBINING = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})


@dataclass
class Scheme:
    """What is computed in integers.

    Attributes:
        grids: Grid of every tensor that a node makes in integers, and of every input of a layer that is rounded on the
            spot.
        open: Tensors whose grid is still to be fitted, each with the tensor whose values it has to hold.
        combining: Names of the nodes other than layers that compute in integers.
        layers: The layers that do, by name of the node.
        breaks: Why layers and their inputs are not integers from end to end: name of a node to the reason.
    """

    grids: dict[str, InputGrid] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    combining: set[str] = field(default_factory=set)
    layers: dict[str, IntegerLayer] = field(default_factory=dict)
    breaks: dict[str, str] = field(default_factory=dict)


def grid_of(mark: Any) -> InputGrid:
    """The grid that a marking node stands for."""
    helper = import_module("onnx").helper
    return InputGrid(**{x.name: helper.get_attribute_value(x) for x in mark.attribute})


def moves(view: GraphView, node: Any) -> bool:
    """Whether a node only moves or clamps what it takes first."""
    if node.op_type == "MaxPool":
        return len(node.output) == 1
    if node.op_type == "Pad":
        value = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0
        return value is not None and bool(np.all(value == 0))
    if node.op_type == "Clip":
        return all(view.constant(name) is not None for name in node.input[1:] if name)
    return node.op_type in CLAMPS | MOVES


def make_scheme(graph: Any, layers: Mapping[str, IntegerLayer]) -> Scheme:
    """Decide what is computed in integers.

    Args:
        graph: The graph, normalizations taken into the layers, and the inputs of layers marked.
        layers: The layers that can have integer weights, by name of the node.
    """
    analysis, scheme = _Analysis(GraphView(graph), layers), Scheme()
    for node in graph.node:
        layer = layers.get(node.name)
        if layer is not None:
            if not analysis.quantizable(node.input[0]):
                scheme.breaks[node.name] = "its input is not rounded"
                continue
            scheme.layers[node.name] = layer
        combining = layer is None and analysis.combines(node)
        if combining:
            scheme.combining.add(node.name)
        if combining or (layer is not None and analysis.inherent(node.output[0])):
            grid, seen = analysis.destination(node.output[0])
            if grid is None:
                scheme.open[node.output[0]] = seen
            else:
                scheme.grids[node.output[0]] = grid
        if node.op_type == ROUND_INPUT and not analysis.inherent(node.input[0]):
            scheme.grids[node.output[0]] = grid_of(node)
            if reason := analysis.breaker(node.input[0]):
                scheme.breaks.setdefault(*reason)
    return scheme


class _Analysis:
    """Questions about the tensors of a graph; answers are kept."""

    def __init__(self, view: GraphView, layers: Mapping[str, IntegerLayer]) -> None:
        self.view, self.layers = view, layers
        self.quantizable, self.inherent = cache(self._quantizable), cache(self._inherent)
        self.needed = cache(self._needed)
        self._combining: dict[str, bool] = {}

    def combines(self, node: Any) -> bool:
        """Whether a node other than a layer computes in integers."""
        if node.op_type not in COMBINING or (node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0)):
            return False
        if node.name not in self._combining:
            self._combining[node.name] = all(map(self.quantizable, node.input)) and self.needed(node.output[0])
        return self._combining[node.name]

    def _quantizable(self, tensor: str) -> bool:
        """Whether a tensor can be had in integers."""
        if any(taker.op_type == ROUND_INPUT for taker in self.view.takers[tensor]):
            return True
        source = self._source(tensor)
        if source is None:
            return False
        if source.op_type == ROUND_INPUT:
            return True
        if source.name in self.layers:
            return self.quantizable(source.input[0])
        return source.op_type in COMBINING and all(map(self.quantizable, source.input))

    def _source(self, tensor: str) -> Any | None:
        """The node that a tensor comes from by moving and clamping alone; ``None`` for an input of the network."""
        producer = self.view.producers.get(tensor)
        while producer is not None and moves(self.view, producer):
            producer = self.view.producers.get(producer.input[0])
        return producer

    def _inherent(self, tensor: str) -> bool:
        """Whether a tensor is made in integers, rather than rounded after it was made."""
        producer = self.view.producers.get(tensor)
        if producer is None:
            return False
        if producer.op_type == ROUND_INPUT:
            return True
        if moves(self.view, producer):
            return self.inherent(producer.input[0])
        if producer.name in self.layers:
            # A convolution has integer kernels for integer outputs alone.
            return self.quantizable(producer.input[0]) and (producer.op_type == "Conv" or self.needed(tensor))
        return self.combines(producer)

    def _needed(self, tensor: str) -> bool:
        """Whether a tensor leads to an input of a layer through nodes that can work on integers."""
        return any(
            taker.op_type == ROUND_INPUT
            or (moves(self.view, taker) and taker.input[0] == tensor and any(map(self.needed, taker.output)))
            or self.combines(taker)
            for taker in self.view.takers[tensor]
        )

    def destination(self, tensor: str) -> tuple[InputGrid | None, str]:
        """The grid of what a tensor becomes, if that is rounded anyway; and the last tensor to clamp it to."""
        clamped = seen = tensor
        only_clamps = True
        while True:
            marks = [x for x in self.view.takers[seen] if x.op_type == ROUND_INPUT]
            if marks:
                return grid_of(marks[0]), seen
            taker = self.view.only_taker(seen)
            if taker is None or not moves(self.view, taker) or taker.input[0] != seen or len(taker.output) > 1:
                return None, clamped
            seen, only_clamps = taker.output[0], only_clamps and taker.op_type in CLAMPS
            clamped = seen if only_clamps else clamped

    def breaker(self, tensor: str) -> tuple[str, str] | None:
        """The node that keeps a tensor from being an integer, with the reason; ``None`` for an input of the network."""
        source = self._source(tensor)
        if source is None:
            return None
        reason = f"{source.op_type} is computed in floating point"
        if source.op_type in COMBINING:
            for name in source.input:
                if self.view.constant(name) is not None:
                    return source.name, f"{source.op_type} with a constant is computed in floating point"
                if not self.quantizable(name):
                    return self.breaker(name) or (source.name, reason)
        return source.name, reason
