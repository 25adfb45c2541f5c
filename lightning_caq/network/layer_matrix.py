"""A layer as a matrix: every layer multiplies a weight matrix by columns cut from its input.

A linear layer multiplies its input vectors, a convolution the patches under its kernel, group by group, and a
transposed convolution the patches of its input with zeros put between the pixels. One form, ``output = matrix @
columns``, then serves everything that looks at a layer from its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_caq.network.layers import Layer
from lightning_caq.network.operator_call import OperatorCall, operator_call


def to_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as matrices, shape (groups, outputs per group, columns).

    Example:
        >>> to_matrix(Layer("c", "conv2d", (8, 3, 5, 5), groups=2), torch.zeros(8, 3, 5, 5)).shape
        torch.Size([2, 4, 75])
    """
    if layer.transposed:
        inputs, outputs = weight.shape[0] // layer.groups, weight.shape[1]
        kernel = weight.reshape(layer.groups, inputs, outputs, *weight.shape[2:]).transpose(1, 2)
        return kernel.flip(tuple(range(3, kernel.ndim))).reshape(layer.groups, outputs, -1)
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)


def from_matrix(layer: Layer, matrix: Tensor) -> Tensor:
    """The weight that ``to_matrix`` was made from."""
    if layer.transposed:
        inputs, outputs, *kernel = layer.shape
        weight = matrix.reshape(layer.groups, outputs, inputs // layer.groups, *kernel)
        return weight.flip(tuple(range(3, weight.ndim))).transpose(1, 2).reshape(layer.shape)
    return matrix.reshape(layer.shape)


def columns(
    layer: Layer, module: Any, inputs: Tensor, chosen: Tensor | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """The columns a layer multiplies, shape (samples, groups, columns, positions).

    Args:
        layer: The layer; not an embedding, whose columns are the words themselves.
        module: Its module, which is asked what operator it applies to what.
        inputs: Its input, samples first.
        chosen: Which positions of each sample to give, shape (samples, positions); all by default.
        size: Size of its output past the channels, where a transposed convolution was asked for one.

    Returns:
        Columns such that ``to_matrix(layer, weight) @ columns`` is the output without bias, group by group.

    Example:
        >>> conv = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)
        >>> x = torch.randn(5, 2, 6, 6)
        >>> layer = Layer("c", "conv2d", (4, 2, 3, 3))
        >>> y = to_matrix(layer, conv.weight) @ columns(layer, conv, x)
        >>> torch.allclose(y.reshape(5, 4, 6, 6), conv(x), atol=1e-5)
        True
    """
    call = operator_call(module, inputs, size)
    inputs = call.inputs
    if layer.kind == "linear":
        vectors = inputs.reshape(len(inputs), 1, -1, inputs.shape[-1]).transpose(2, 3)
        return vectors if chosen is None else vectors[_each(chosen), :, :, chosen].permute(0, 2, 3, 1)
    patches = _patches(layer, call)
    n = len(call.stride)
    spatial = patches.shape[2 : 2 + n]
    if chosen is not None:
        place: tuple[Any, ...] = (_each(chosen), slice(None), *torch.unravel_index(chosen, spatial))
        return patches[place].movedim(1, -1).reshape(len(inputs), layer.groups, -1, chosen.shape[1])
    order = (0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return patches.permute(order).reshape(len(inputs), layer.groups, -1, spatial.numel())


def _each(chosen: Tensor) -> Tensor:
    """The sample that each of the chosen positions belongs to."""
    return torch.arange(len(chosen), device=chosen.device)[:, None]


def count_positions(layer: Layer, module: Any, inputs: Tensor) -> int:
    """How many columns of each group a sample has.

    Example:
        >>> conv = torch.nn.Conv2d(2, 4, 3, stride=2)
        >>> count_positions(Layer("c", "conv2d", (4, 2, 3, 3)), conv, torch.zeros(5, 2, 7, 7))
        9
    """
    if layer.kind == "linear":
        return inputs[0].numel() // inputs.shape[-1]
    call = operator_call(module, inputs[:1])
    return _patches(layer, call).shape[2 : 2 + len(call.stride)].numel()


def _patches(layer: Layer, call: OperatorCall) -> Tensor:
    """What lies under the kernel, shape (samples, channels, *positions, *kernel); only padding makes a copy."""
    kernel = layer.shape[2:]
    if layer.transposed:
        patches, stride = _spread(call, kernel), (1,) * len(call.stride)
    else:
        sides = [side for pair in reversed(call.padding) for side in pair]  # F.pad begins with the last dimension
        patches, stride = F.pad(call.inputs, sides) if any(sides) else call.inputs, call.stride
    for d, (size, step, gap) in enumerate(zip(kernel, stride, call.dilation, strict=True)):
        patches = patches.unfold(2 + d, (size - 1) * gap + 1, step)[..., ::gap]
    return patches


def _spread(call: OperatorCall, kernel: Sequence[int]) -> Tensor:
    """Zeros between and around the pixels: a transposed convolution is a plain one over this."""
    inputs = call.inputs
    spread = inputs.new_zeros(
        *inputs.shape[:2], *((size - 1) * s + 1 for size, s in zip(inputs.shape[2:], call.stride, strict=True))
    )
    every: tuple[Any, ...] = tuple(slice(None, None, s) for s in call.stride)
    spread[(..., *every)] = inputs
    sides: list[int] = []
    for size, gap, (pad, _), extra in zip(kernel, call.dilation, call.padding, call.output_padding, strict=True):
        edge = gap * (size - 1) - pad
        sides = [edge, edge + extra, *sides]
    return F.pad(spread, sides)


def along_channels(layer: Layer, values: Tensor, output: Tensor) -> Tensor:
    """A vector, one number an output channel, in a shape and type that adds to the layer's output.

    Example:
        >>> layer = Layer("conv", "conv2d", (2, 1, 3, 3))
        >>> along_channels(layer, torch.zeros(2), torch.zeros(5, 2, 8, 8)).shape
        torch.Size([2, 1, 1])
    """
    return values.to(output).reshape(-1, *(1,) * (-layer.channel_axis - 1))
