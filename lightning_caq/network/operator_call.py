"""Operator calls: what a module really multiplies its weight by, seen in the call of torch's operator itself.

What a module's attributes say need not be what happens: convolutions that pad in a child or in their ``forward``, as
those of EfficientNet do, carry ``padding=0`` and hand a padded input on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class OperatorCall:
    """One call of a linear operator or of a convolution.

    Attributes:
        inputs: What the operator is given, samples first.
        stride: Steps of the kernel, one a dimension; nothing for a linear operator, as for all that follows.
        padding: Zeros at either side of each dimension, (before, after).
        dilation: Gaps of the kernel.
        output_padding: What a transposed convolution adds at the end of each dimension.
    """

    inputs: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()


def operator_call(module: Any, inputs: Tensor) -> OperatorCall:
    """The operator that a module applies its weight with, and what it is given; the operator itself is not run.

    Args:
        module: A linear layer or a convolution, of a subclass perhaps.
        inputs: The module's input.

    Returns:
        The first call in the module's ``forward`` of an operator of its kind with a weight of its shape. Where there is
        none, as where a subclass computes the product in another way, that of torch's own class.

    Example:
        >>> conv = nn.Conv2d(1, 1, 3, padding="same", padding_mode="circular")
        >>> found = operator_call(conv, torch.zeros(2, 1, 5, 5))
        >>> found.inputs.shape, found.padding
        (torch.Size([2, 1, 7, 7]), ((0, 0), (0, 0)))
    """
    kind = next(kind for kind in _KINDS if isinstance(module, kind))
    for forward in (module.forward, lambda x: kind.forward(module, x)):
        call = _intercepted(forward, module, inputs)
        if call is not None:
            return call
    raise AssertionError(f"{kind.__name__} applies no operator")


class _Intercepted(Exception):
    """Raised in place of the operator."""

    def __init__(self, call: OperatorCall) -> None:
        self.call = call


class _Interception(TorchFunctionMode):
    """While it is entered, the first operator that is applied with a weight of one shape is not run but noted."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear or func in _PLAIN or func in _TRANSPOSED:
            weight: Tensor = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.shape == self._shape:
                raise _Intercepted(_described(func, args, kwargs))
        return func(*args, **kwargs)


def _intercepted(forward: Callable[..., Any], module: Any, inputs: Tensor) -> OperatorCall | None:
    try:
        with _Interception(module.weight.shape):
            forward(inputs)
    except _Intercepted as found:
        return found.call
    return None


def _described(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperatorCall:
    if func in _PLAIN:
        return _plain(_PLAIN[func], *args, **kwargs)
    if func in _TRANSPOSED:
        return _transposed(_TRANSPOSED[func], *args, **kwargs)
    return OperatorCall(args[0] if args else kwargs["input"])


def _plain(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> OperatorCall:
    gaps = _each(dilation, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":  # torch pads one more at the end where the sum is odd
        sums = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in sums)
    else:
        sides = tuple((side, side) for side in _each(padding, dims))
    return OperatorCall(input, _each(stride, dims), sides, gaps)


def _transposed(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> OperatorCall:
    sides = tuple((side, side) for side in _each(padding, dims))
    return OperatorCall(input, _each(stride, dims), sides, _each(dilation, dims), _each(output_padding, dims))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
