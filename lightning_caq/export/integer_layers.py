"""Integer layers: a layer of the network with whole weights, and the normalization behind it taken into its scales.

y = γ (W x + b − μ) / σ + β is a layer with the scales s γ / σ and the bias (b − μ) γ / σ + β, its codes the same. So a
batch normalization costs no accuracy and no time (Jacob et al. 2018, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np

from lightning_caq.export.integer_view import GraphView, attribute
from lightning_caq.export.integers import Integers

LAYERS = ("Conv", "Gemm", "MatMul")
_LARGEST_BIAS = 2.0**30


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer whose weight is scale · codes with codes of one signed byte.

    Attributes:
        node: The node, ``Conv``, ``Gemm`` or ``MatMul``.
        key: State-dict key of its weight.
        codes: Whole numbers from −128 to 127, in the shape that the node takes.
        scale: One an output channel, above 0, float32.
        axis: Dimension of ``codes`` that channels lie along.
        bias: One an output channel, float32, or ``None``.
        output: The tensor that it makes, normalization included.
        moved: Channels whose codes had to be rounded again.
    """

    node: Any
    key: str
    codes: np.ndarray
    scale: np.ndarray
    axis: int
    bias: np.ndarray | None
    output: str
    moved: int = 0

    def with_bias_for(self, step: float) -> IntegerLayer:
        """The layer with scales large enough for its bias to be a 32-bit number of steps of its products.

        Args:
            step: The step of its inputs.
        """
        if self.bias is None:
            return self
        least = (np.abs(self.bias).astype(np.float64) / (step * _LARGEST_BIAS)).astype(np.float32)
        return self._rescaled(np.maximum(self.scale, least))

    def scaled(self, factor: np.ndarray, shift: np.ndarray) -> IntegerLayer:
        """The layer with its outputs multiplied and shifted, channel by channel; both float64."""
        bias = shift if self.bias is None else self.bias * factor + shift
        scale = (self.scale * np.abs(factor)).astype(np.float32)
        dead = scale == 0
        turned = replace(
            self,
            codes=self.codes * self._along(np.where(dead, 0, np.where(factor < 0, -1, 1))),
            scale=np.where(dead, np.float32(1), scale),
            bias=bias.astype(np.float32),
        )
        beyond = turned.codes > 127
        if not beyond.any():
            return turned
        other = tuple(d for d in range(self.codes.ndim) if d != self.axis)
        return turned._rescaled(np.where(beyond.any(other), turned.scale * np.float32(128 / 127), turned.scale))

    def _rescaled(self, scale: np.ndarray) -> IntegerLayer:
        """The layer with other scales, and codes that come nearest to its weights."""
        if (scale == self.scale).all():
            return self
        codes = np.rint(self.codes * self._along(self.scale.astype(np.float64) / scale)).astype(np.int32)
        return replace(self, codes=codes, scale=scale, moved=self.moved + int((scale != self.scale).sum()))

    def _along(self, channels: np.ndarray) -> np.ndarray:
        """Numbers of channels in a shape that broadcasts to the codes."""
        return channels.reshape([-1 if d == self.axis else 1 for d in range(self.codes.ndim)])


def find_integer_layers(
    graph: Any, weights: Mapping[str, Integers]
) -> tuple[dict[str, IntegerLayer], dict[str, str], set[str]]:
    """The layers of a graph that can have integer weights.

    Args:
        graph: The ``onnx.GraphProto``, the weights among its inputs.
        weights: Those, by name.

    Returns:
        Name of a node to its layer; name of a node to the reason why it cannot be one; and the tensors whose nodes
        became part of a layer.
    """
    view, layers, reasons, absorbed = GraphView(graph), {}, {}, set()
    for node in graph.node:
        if node.op_type not in (*LAYERS, "ConvTranspose") or len(node.input) < 2:
            continue
        key, turned = _weight_of(view, node, weights)
        if key is None:
            continue
        layer = _layer(view, node, key, weights[key], turned)
        if isinstance(layer, str):
            reasons[node.name] = layer
            continue
        if turned:
            absorbed.add(node.input[1])
        layers[node.name] = _folded(view, layer, absorbed)
    return layers, reasons, absorbed


def signed_codes(stored: Integers) -> np.ndarray:
    """The integers of a weight less their zero points, int32.

    Example:
        >>> import torch
        >>> four, zero = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor(3, dtype=torch.int32)
        >>> signed_codes(Integers("uint4", four, torch.tensor(0.5), zero, axis=0, doubled=False)).tolist()
        [[-2, -1]]
    """
    zero = stored.zero_point.cpu().numpy()
    shape = [-1 if d == stored.axis else 1 for d in range(stored.values.ndim)] if zero.ndim else []
    return np.asarray(stored.values.cpu().numpy() - zero.reshape(shape), dtype=np.int32)


def _weight_of(view: GraphView, node: Any, weights: Collection[str]) -> tuple[str | None, bool]:
    """The key of a node's weight, and whether it is transposed first."""
    name = node.input[1]
    if name in weights:
        return name, False
    producer = view.producers.get(name)
    if producer is None or producer.op_type != "Transpose" or producer.input[0] not in weights:
        return None, False
    turned = list(attribute(producer, "perm", [1, 0])) == [1, 0]
    return (producer.input[0], True) if turned else (None, False)


def _layer(view: GraphView, node: Any, key: str, stored: Integers, turned: bool) -> IntegerLayer | str:
    """A layer without what stands behind it, or why there is none."""
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer kernel for ConvTranspose"
    plain = (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0), attribute(node, "transA", 0)) == (1, 1, 0)
    if not plain:
        return "a Gemm with factors"
    if stored.scale.ndim > 1:
        return "integer kernels take one scale a channel; quantize without group_size"
    codes = signed_codes(stored)
    if codes.min(initial=0) < -128 or codes.max(initial=0) > 127:
        return (
            f"weights less zero point span {codes.min()} to {codes.max()}, more than a signed byte; quantize with "
            "runtime='onnxruntime'"
        )
    outputs = 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)) else 0
    axis = stored.axis
    if turned:
        codes, axis = np.ascontiguousarray(codes.T), 1 - axis
    if stored.scale.ndim and stored.scale.numel() > 1 and axis != outputs:
        return "scales do not lie along the outputs"
    scale = np.broadcast_to(stored.scale.cpu().float().numpy().reshape(-1), (codes.shape[outputs],)).copy()
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = view.constant(node.input[2])
        if bias is None or bias.size != scale.size:
            return "its bias is no constant"
        bias = bias.reshape(-1)
    return IntegerLayer(
        node=node,
        key=key,
        codes=codes,
        scale=scale,
        axis=outputs,
        bias=bias,
        output=node.output[0],
    )


def _folded(view: GraphView, layer: IntegerLayer, absorbed: set[str]) -> IntegerLayer:
    """A layer with the batch normalizations behind it taken in; their outputs are added to ``absorbed``."""
    if layer.node.op_type == "MatMul":
        return layer  # it takes no bias
    while (follower := view.only_taker(layer.output)) is not None and follower.op_type == "BatchNormalization":
        numbers = [view.constant(name) for name in follower.input[1:5]]
        if any(x is None for x in numbers) or len([name for name in follower.output if name]) > 1:
            break
        gamma, beta, mean, variance = (x.astype(np.float64) for x in numbers if x is not None)
        factor = gamma / np.sqrt(variance + attribute(follower, "epsilon", 1e-5))
        absorbed.add(follower.output[0])
        layer = replace(layer.scaled(factor, beta - mean * factor), output=follower.output[0])
    return layer


def folded_graph(graph: Any, layers: Mapping[str, IntegerLayer], absorbed: Collection[str]) -> list[Any]:
    """The nodes of a graph with each layer as one node, and with spatial means as GlobalAveragePool.

    Args:
        graph: The ``onnx.GraphProto``, left as it is.
        layers: Layers by name of the node, from ``find_integer_layers``.
        absorbed: Tensors whose nodes are part of a layer.
    """
    view, nodes = GraphView(graph), []
    for node in graph.node:
        if node.output[0] in absorbed:
            continue
        new = type(node)()
        new.CopyFrom(node)
        if node.name in layers:
            new.output[0] = layers[node.name].output
        nodes += _global_pool(view, new)
    return nodes


def _global_pool(view: GraphView, node: Any) -> list[Any]:
    """A mean over height and width as the node for which ONNX Runtime has an integer kernel; others as they are."""
    axes = view.constant(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
    if axes is None or view.rank(node.input[0]) != 4 or sorted(int(a) % 4 for a in axes) != [2, 3]:
        return [node]
    make = import_module("onnx").helper.make_node
    if attribute(node, "keepdims", 1):
        return [make("GlobalAveragePool", node.input[:1], node.output, node.name)]
    pooled = f"{node.output[0]}.pooled"
    return [
        make("GlobalAveragePool", node.input[:1], [pooled], node.name),
        make("Flatten", [pooled], node.output, f"{node.name}.flatten", axis=1),
    ]
