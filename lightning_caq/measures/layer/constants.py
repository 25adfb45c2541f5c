"""Lipschitz constants of torch functions, in the Euclidean norm of a sample's tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_caq.measures.layer.blocks import FOLLOWERS
from lightning_caq.measures.layer.lipschitz import squared_norm

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def function_name(func: Callable[..., Any]) -> str:
    """What a torch function is called, in place or not, as a function or a method.

    Example:
        >>> [function_name(f) for f in (torch.relu, Tensor.relu_, Tensor.__getitem__)]
        ['relu', 'relu', 'getitem']
    """
    return func.__name__.split(".")[0].strip("_")


@torch.no_grad()
def lipschitz_constants(
    func: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    moving: Sequence[Tensor],
    output: Tensor,
    generator: torch.Generator,
) -> list[float] | None:
    """How much a function's output changes per change of each of its inputs that are no constants.

    Functions are known by their names, so that ``torch.relu``, ``F.relu`` and ``Tensor.relu_`` are one.

    Args:
        func: The torch function.
        args: Its arguments by place.
        kwargs: Its arguments by keyword.
        moving: Those among them that depend on what comes before; the others are constants.
        output: What it returned; of several tensors the first.
        generator: Draws the starting vector where a constant is computed by Lanczos.

    Returns:
        A constant for each of ``moving``; ``None`` where none is known.

    Example:
        >>> x = torch.randn(2, 3)
        >>> lipschitz_constants(torch.mul, (x, -2.0), {}, [x], -2 * x, torch.Generator())
        [2.0]
        >>> lipschitz_constants(torch.mul, (x, x), {}, [x, x], x * x, torch.Generator()) is None
        True
    """
    name = function_name(func)
    # A tensor that is broadcast is repeated, and its change with it.
    repeats = [math.sqrt(max(output.numel() / x.numel(), 1.0)) for x in moving]
    if name in _SUMS and set(kwargs) <= {"other"}:
        return repeats
    if name in _JOINS:
        return [1.0] * len(moving)
    if len(moving) > 1 or not args or moving[0] is not args[0]:
        factor = _factor(name, args, kwargs, moving[0]) if len(moving) == 1 else None
        return None if factor is None else [factor * repeats[0]]
    if name in _SELECTIONS:
        return [1.0]
    if name in _LINEAR:
        return [operator_norm(lambda x: func(x, *args[1:], **kwargs), moving[0], generator)]
    known = FOLLOWERS.get(func, _CONSTANTS.get(name))
    constant = known(args, kwargs) if known is not None else _factor(name, args, kwargs, moving[0])
    if constant is None:
        return None
    return [constant * (repeats[0] if known is None else 1.0)]


def operator_norm(
    function: Callable[[Tensor], Tensor], like: Tensor, generator: torch.Generator, *, tolerance: float = 1e-3
) -> float:
    """σ_max of the linear part of an affine function; out/in.

    The residual is added, so that it is not too small.

    Args:
        function: The affine function x ↦ M x + c.
        like: A tensor of the shape, type and device of x.
        generator: Draws the starting vector.
        tolerance: Largest relative residual of σ_max².

    Example:
        >>> M = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> round(operator_norm(lambda x: M @ x + 1, torch.zeros(2), torch.Generator().manual_seed(0)), 3)
        3.0
    """
    value, residual = squared_norm(function, like, generator, tolerance)
    return math.sqrt(value + residual)


def _factor(name: str, args: Args, kwargs: Kwargs, moving: Tensor) -> float | None:
    """Largest |c| of a product with a constant c, or of a quotient by one; a rounded quotient has none."""
    if len(args) != 2 or kwargs or name not in {*_PRODUCTS, *_QUOTIENTS}:
        return None
    constant = args[1] if args[0] is moving else args[0]
    sizes = torch.as_tensor(constant).abs()
    if name in _PRODUCTS:
        return float(sizes.max())
    return 1.0 / float(sizes.min()) if args[0] is moving and float(sizes.min()) > 0 else None


def _constant(value: float) -> Callable[[Args, Kwargs], float | None]:
    return lambda args, kwargs: value


def _dropout(args: Args, kwargs: Kwargs) -> float | None:
    return None if kwargs.get("training", args[2] if len(args) > 2 else True) else 1.0


def _max_pool(args: Args, kwargs: Kwargs) -> float | None:
    """√ of the largest number of windows that one entry lies in: each of them may take it for its maximum."""
    names = ("input", "kernel_size", "stride", "padding", "dilation")
    values = {"stride": None, "dilation": 1, **dict(zip(names, args, strict=False)), **kwargs}
    if values.get("return_indices"):
        return None
    axes = args[0].ndim - 2
    kernel = _each(values["kernel_size"], axes)
    stride = _each(values["stride"], axes) if values["stride"] else kernel
    windows = [
        math.ceil(k / s) if d == 1 else k
        for k, s, d in zip(kernel, stride, _each(values["dilation"], axes), strict=True)
    ]
    return math.sqrt(math.prod(windows))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    several = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return several * axes if len(several) == 1 else several


def _log_softmax(args: Args, kwargs: Kwargs) -> float | None:
    """‖I − 1 pᵀ‖, an oblique projection, is at most ‖1‖ ‖p‖ ≤ √n for n classes."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    return None if axis is None else math.sqrt(args[0].shape[axis])


def _prelu(args: Args, kwargs: Kwargs) -> float | None:
    return max(1.0, float(args[1].abs().max()))


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SUMS = _names("add radd iadd sub rsub isub subtract")
_JOINS = _names("cat concat concatenate stack hstack vstack")
_PRODUCTS = _names("mul rmul imul multiply")
_QUOTIENTS = _names("div truediv itruediv divide true_divide")
# Each entry of the output is an entry of the input, and none is taken twice.
_SELECTIONS = _names(
    "view reshape flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze contiguous clone to float "
    "double detach alias view_as reshape_as requires_grad narrow select split chunk unbind tensor_split flip roll "
    "pixel_shuffle pixel_unshuffle channel_shuffle diagonal"
)
# Affine in their first argument, the others held: their norm is measured on a tensor of the shape that was met.
_LINEAR = _names(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm getitem index_select "
    "expand expand_as repeat pad mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d interpolate upsample"
)
_CONSTANTS: dict[str, Callable[[Args, Kwargs], float | None]] = {
    # torch.batch_norm has its arguments in another order than F.batch_norm.
    **{f.__name__: constant for f, constant in FOLLOWERS.items() if f.__name__ != "batch_norm"},
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), _dropout),
    **dict.fromkeys(
        ("neg", "abs", "clamp", "clip", "clamp_min", "clamp_max", "amax", "amin", "sin", "cos"), _constant(1.0)
    ),
    "hardsigmoid": _constant(1 / 6),
    "selu": _constant(1.7581),
    "softsign": _constant(1.0),
    "logsigmoid": _constant(1.0),
    "softmax": _constant(0.5),
    "log_softmax": _log_softmax,
    "prelu": _prelu,
}
