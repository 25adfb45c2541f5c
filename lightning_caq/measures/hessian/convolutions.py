"""Convolutions whose second derivatives cost no more than what is asked for.

Torch keeps the derivatives of a convolution by its input and by its weight in one node of the graph, and the second
derivative of that node computes all its parts, wanted or not: products with single layers' blocks of the Hessian would
spend a third of their time on parts that are thrown away. Here each derivative has a node of its own, so that autograd
leaves out the one that leads nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups
_PLAIN: dict[Callable[..., Tensor], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class SeparateConvolutions(TorchFunctionMode):
    """While it is entered, convolutions record their derivatives by input and by weight as separate nodes.

    Example:
        >>> x, conv = torch.randn(2, 3, 5, 5), torch.nn.Conv2d(3, 4, 3)
        >>> with SeparateConvolutions():
        ...     y = conv(x)
        >>> bool(torch.allclose(y, conv(x), atol=1e-6))
        True
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PLAIN:
            return func(*args, **(kwargs or {}))
        return _convolve(func, *args, **(kwargs or {}))


def _convolve(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = _PLAIN[func]
    unbatched = input.ndim != n + 2
    if isinstance(padding, str) or unbatched or not weight.requires_grad or (bias is not None and bias.requires_grad):
        return func(input, weight, bias, stride, padding, dilation, groups)
    geometry: Geometry = (_each(stride, n), _each(padding, n), _each(dilation, n), groups)
    output: Tensor = _ByInput.apply(input, [weight], bias, geometry)
    zeros: Tensor = _ByWeight.apply(weight, [input], output.shape, geometry)
    return output + zeros


class _ByInput(torch.autograd.Function):
    """The convolution, as a function of its input alone; the weight comes in a list, where autograd sees no edge."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, boxed: list[Tensor], bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.weight, ctx.shape, ctx.geometry = boxed[0], x.shape, geometry
        stride, padding, dilation, groups = geometry
        still = (0,) * len(stride)
        return torch.convolution(x, boxed[0].detach(), bias, stride, padding, dilation, False, still, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        stride, padding, dilation, groups = ctx.geometry
        weight: Tensor = ctx.weight
        # The part of the input behind the last stride, which no output looks at.
        rest = [
            size - ((out - 1) * s - 2 * p + d * (kernel - 1) + 1)
            for size, out, kernel, s, p, d in zip(
                ctx.shape[2:], gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        return (
            torch.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups),
            None,
            None,
            None,
        )


class _ByWeight(torch.autograd.Function):
    """Zeros, with the derivative of the convolution by its weight alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, boxed: list[Tensor], shape: torch.Size, geometry: Geometry) -> Tensor:
        ctx.input, ctx.weight, ctx.geometry = boxed[0], weight.detach(), geometry
        return weight.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        stride, padding, dilation, groups = ctx.geometry
        wanted, still = (False, True, False), (0,) * len(stride)
        parts = torch.ops.aten.convolution_backward(
            gradient, ctx.input, ctx.weight, None, stride, padding, dilation, False, still, groups, wanted
        )
        return parts[1], None, None, None


def _each(value: Any, n: int) -> tuple[int, ...]:
    """A number for every dimension."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
