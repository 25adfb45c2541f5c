"""Fake-quant modules: the modules of the network themselves, in a subclass whose forward pass snaps to a grid.

A swapped module stays the same object, with the same Parameters, hooks, device and state-dict keys; only its class
changes. Its ``weight`` holds values of the grid, so a state dict gives the quantized outputs in a plain model too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.quantizers.activations import InputGrid, change_first
from lightning_caq.quantizers.affine import Grid


class FakeQuant:
    """What every fake-quant module adds to the class it replaces.

    Attributes:
        plain_class: The class it replaces.
        bits: Bit-width.
        scale: Step of the grid, float32, a buffer that is not saved.
        zero_point: Code of zero, float32, a buffer that is not saved.
        input_grid: Grid of the input, or ``None`` where inputs stay as they are.
        quantizing: Whether the forward pass snaps to the grid. Turned off, with a warning, when a state dict brings
            weights that are not on the grid: they run as the float weights they are.
    """

    plain_class: ClassVar[type[nn.Module]]
    bits: int
    scale: Tensor
    zero_point: Tensor
    input_grid: InputGrid | None
    quantizing: bool
    weight: Tensor

    @property
    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.bits, self.scale, self.zero_point)

    def quantized_weight(self) -> Tensor:
        """The weight on the grid, in its own dtype; its gradient passes straight through (Bengio et al. 2013)."""
        if not self.quantizing:
            return self.weight
        snapped = self.grid.nearest(self.weight.detach()).to(self.weight.dtype)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return snapped
        return self.weight + (snapped - self.weight).detach()

    def rounded_input(self, input: Tensor) -> Tensor:
        """The input on its grid, if it has one, in its own dtype; its gradient passes straight through."""
        if self.input_grid is None or not self.quantizing:
            return input
        return self.input_grid.round(input)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if prefix + "weight" not in state_dict:
            return
        self.quantizing = on_grid(self.weight, self.grid)
        if not self.quantizing:
            # The same words for every layer: Python then shows them once.
            warnings.warn(
                "A quantized network was loaded with weights that do not lie on its grids, such as those of a float "
                "checkpoint; these layers run as the float layers they are. Quantize again to quantize them.",
                stacklevel=2,
            )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on demand and has no importable name, so copies and pickles name the class it was made from.
        return _rebuild, (self.plain_class,), self.__dict__.copy()


class _Linear(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.rounded_input(input), self.quantized_weight(), self.bias)  # type: ignore[attr-defined]


class _Conv(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        output: Tensor = this._conv_forward(self.rounded_input(input), self.quantized_weight(), this.bias)
        return output


class _ConvTranspose(FakeQuant):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        this: Any = self
        input = self.rounded_input(input)
        dims = len(this.kernel_size)
        extra = this._output_padding(
            input, output_size, this.stride, this.padding, this.kernel_size, dims, this.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return convolve(
            input, self.quantized_weight(), this.bias, this.stride, this.padding, extra, this.groups, this.dilation
        )


class _Embedding(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        return F.embedding(
            input,
            self.quantized_weight(),
            this.padding_idx,
            this.max_norm,
            this.norm_type,
            this.scale_grad_by_freq,
            this.sparse,
        )


_MIXINS: tuple[tuple[tuple[type[nn.Module], ...], type[FakeQuant]], ...] = (
    ((nn.Linear,), _Linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _Conv),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _ConvTranspose),
    ((nn.Embedding,), _Embedding),
)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fake_quant_class(base: type[nn.Module]) -> type[nn.Module]:
    """The fake-quant subclass of a module class.

    A user's subclass with a forward of its own keeps that forward: it uses ``weight``, whose values lie on the grid,
    and is given its first argument rounded.

    Example:
        >>> fake_quant_class(nn.Linear).__name__
        'FakeQuantLinear'
    """
    if base in _classes:
        return _classes[base]
    bases, mixin = next((bases, mixin) for bases, mixin in _MIXINS if issubclass(base, bases))
    plain = any(base.forward is kind.forward for kind in bases)
    names: dict[str, Any] = {"__module__": __name__, "plain_class": base}
    if not plain:
        names["forward"] = rounding_forward(base)
    _classes[base] = type(f"FakeQuant{base.__name__}", (mixin if plain else FakeQuant, base), names)
    return _classes[base]


def rounding_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class, its first argument rounded by the ``rounded_input`` of the module."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = change_first(self.rounded_input, args, kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = fake_quant_class(base)
    return cls.__new__(cls)


def on_grid(weight: Tensor, grid: Grid) -> bool:
    """Whether every weight lies on a value of the grid, up to the rounding of the weight's own dtype."""
    weight = weight.detach()
    nearest = grid.nearest(weight)
    if torch.finfo(weight.dtype).bits < 32:  # its values are coarse, and a value of the grid is rounded to one of them
        return bool(torch.equal(nearest.to(weight.dtype), weight))
    return bool(((nearest - weight.float()).abs() <= 1e-5 * 2**grid.bits * grid.scale).all())
