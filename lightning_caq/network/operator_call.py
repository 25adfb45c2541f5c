"""Operator calls: what a module really multiplies its weight by, seen in the call of torch's operator itself.

What a module's attributes say need not be what happens: convolutions that pad in a child or in their ``forward``, as
those of EfficientNet do, carry ``padding=0`` and hand a padded input on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_caq.network.layers import size_arguments

_PLAIN = {F.conv1d, F.conv2d, F.conv3d}
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_ARGUMENTS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
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


def operator_call(module: Any, inputs: Tensor, size: Sequence[int] | None = None) -> OperatorCall:
    """The operator that a module applies its weight with, and what it is given; the operator itself is not run.

    Args:
        module: A linear layer or a convolution, of a subclass perhaps.
        inputs: The module's input.
        size: Size of its output past the channels, where a transposed convolution was asked for one.

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
    for forward in (module.forward, lambda x, **options: kind.forward(module, x, **options)):
        call = _intercepted(forward, module, inputs, size_arguments(module, size))
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


def _intercepted(
    forward: Callable[..., Any], module: Any, inputs: Tensor, options: Mapping[str, Any]
) -> OperatorCall | None:
    try:
        with _Interception(module.weight.shape):
            forward(inputs, **options)
    except _Intercepted as found:
        return found.call
    return None


def _described(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperatorCall:
    """The call as torch reads its arguments."""
    if func is F.linear:
        return OperatorCall(args[0] if args else kwargs["input"])
    transposed = func in _TRANSPOSED
    given = {**_DEFAULTS, **dict(zip(_ARGUMENTS[transposed], args, strict=False)), **kwargs}
    dims = given["weight"].ndim - 2
    gaps = _each(given["dilation"], dims)
    return OperatorCall(
        inputs=given["input"],
        stride=_each(given["stride"], dims),
        padding=_sides(given["padding"], gaps, given["weight"].shape[2:]),
        dilation=gaps,
        output_padding=_each(given["output_padding"], dims) if transposed else (),
    )


def _sides(padding: Any, gaps: tuple[int, ...], kernel: torch.Size) -> tuple[tuple[int, int], ...]:
    if padding == "same":  # torch pads one more at the end where the sum is odd
        sums = [gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in sums)
    return tuple((side, side) for side in _each(0 if padding == "valid" else padding, len(kernel)))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
