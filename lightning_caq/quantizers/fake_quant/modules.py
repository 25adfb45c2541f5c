"""Fake-quant modules: the modules of the network themselves, in a subclass whose forward pass snaps to a grid.

A swapped module stays the same object, with the same Parameters, hooks, device and state-dict keys; only its class
changes. Its ``weight`` holds values of the grid, so a state dict gives the quantized outputs in a plain model too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.quantizers.fake_quant.learned import lsq_round, pact_round, stretched
from lightning_caq.quantizers.grids.activations import InputGrid, change_first
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.codebook import Codebook
from lightning_caq.quantizers.grids.values import Values

LEARNED = ("scale_factor", "clip_factor")  # Parameters while scales are learned, in no state dict


class FakeQuant:
    """What every fake-quant module adds to the class it replaces.

    Attributes:
        plain_class: The class it replaces.
        bits: Bit-width.
        quantizer: Name of the quantizer. Of its numbers, buffers that are not saved, an affine grid has the first
            three and a codebook the last two.
        scale: Step of the grid, float32, a buffer that is not saved.
        zero_point: Code of zero, float32, a buffer that is not saved.
        channel_bits: Bit-width of each channel, a buffer that is not saved, or ``None`` where all have ``bits``.
        basis: Numbers that the table is made of, float32.
        table: Its values, float32.
        input_grid: Grid of the input, or ``None`` where inputs stay as they are.
        scale_factor: What the scale is multiplied by while it is learned, a Parameter that is not saved, else ``None``.
        clip_factor: The same for the clip of the input.
        quantizing: Whether the forward pass snaps to the grid. Turned off, with a warning, when a state dict brings
            weights that are not on the grid: they run as the float weights they are.
    """

    plain_class: ClassVar[type[nn.Module]]
    bits: int
    quantizer: str
    scale: Tensor
    zero_point: Tensor
    channel_bits: Tensor | None
    basis: Tensor
    table: Tensor
    input_grid: InputGrid | None
    scale_factor: nn.Parameter | None
    clip_factor: nn.Parameter | None
    quantizing: bool
    weight: Tensor

    @property
    def grid(self) -> Values:
        """The values that the weight may take."""
        if self.quantizer != "affine":
            return Codebook(self.quantizer, self.bits, self.basis, self.table)
        grid = self._calibrated()
        return grid if self.scale_factor is None else stretched(grid, self.scale_factor.detach())

    def _calibrated(self) -> Grid:
        return Grid(self.bits, self.scale, self.zero_point, self.channel_bits)

    def quantized_weight(self) -> Tensor:
        """The weight on the grid, in its own dtype; its gradient passes straight through (Bengio et al. 2013)."""
        if not self.quantizing:
            return self.weight
        if self.scale_factor is not None and torch.is_grad_enabled():
            return lsq_round(self.weight, self._calibrated(), self.scale_factor)
        snapped = self.grid.nearest(self.weight.detach()).to(self.weight.dtype)
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return snapped
        return self.weight + (snapped - self.weight).detach()

    def rounded_input(self, input: Tensor) -> Tensor:
        """The input on its grid, if it has one, in its own dtype; its gradient passes straight through."""
        if self.input_grid is None or not self.quantizing:
            return input
        if self.clip_factor is None:
            return self.input_grid.round(input)
        if torch.is_grad_enabled():
            return pact_round(input, self.input_grid, self.clip_factor)
        return self.learned_input_grid(self.input_grid).round(input)

    def learned_input_grid(self, grid: InputGrid) -> InputGrid:
        """The grid of the input with what was learned of it."""
        if self.clip_factor is None:
            return grid
        return replace(grid, scale=float(self.clip_factor.detach().float().clamp_min(1e-3) * grid.scale))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._save_to_state_dict(destination, prefix, *args)  # type: ignore[misc]
        for name in LEARNED:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if key not in [prefix + name for name in LEARNED]]
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


def on_grid(weight: Tensor, grid: Values) -> bool:
    """Whether every weight lies on one of the values, up to the rounding of the weight's own dtype."""
    weight = weight.detach()
    nearest = grid.nearest(weight)
    if torch.finfo(weight.dtype).bits < 32:  # its values are coarse, and a value of the grid is rounded to one of them
        return bool(torch.equal(nearest.to(weight.dtype), weight))
    return bool(((nearest - weight.float()).abs() <= grid.tolerance).all())
