"""Fake-quant modules: the modules of the network themselves, in a subclass whose forward pass snaps to a grid.

A swapped module stays the same object, with the same Parameters, hooks, device and state-dict keys; only its class
changes. Its ``weight`` holds values of the grid, so a state dict gives the quantized outputs in a plain model too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.parts.part import LinearPart, TablePart, WeightPart
from lightning_caq.quantizers.fake_quant.state import PREFIX, FakeQuantState, rounding_state
from lightning_caq.quantizers.grids.activations import change_first
from lightning_caq.quantizers.grids.values import Values


class FakeQuant:
    """What every fake-quant module adds to the class it replaces: a state, under a name that no subclass uses."""

    _lightning_caq_base: ClassVar[type[nn.Module]]  # the class it replaces
    _lightning_caq_fake_quant: FakeQuantState
    weight: Tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._save_to_state_dict(destination, prefix, *args)  # type: ignore[misc]
        for key in [key for key in destination if key.startswith(prefix + PREFIX)]:
            del destination[key]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        missing: list[str] = args[2]
        missing[:] = [key for key in missing if not key.startswith(prefix + PREFIX)]
        if not (self.loaded if isinstance(self, WeightPart) else prefix + "weight" in state_dict):
            return
        state = rounding_state(self)
        state.quantizing = on_grid(self.weight, state.grid.to(self.weight.device))
        if not state.quantizing:
            # The same words for every layer: Python then shows them once.
            warnings.warn(
                "A quantized network was loaded with weights that do not lie on its grids, such as those of a float "
                "checkpoint; these layers run as the float layers they are. Quantize again to quantize them.",
                stacklevel=2,
            )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on demand and has no importable name, so copies and pickles name the class it was made from.
        return _rebuild, (self._lightning_caq_base,), self.__dict__.copy()


def weight_key(module: Any, prefix: str) -> str:
    """State-dict key of the parameter that a module's weight lies in.

    Args:
        module: The module.
        prefix: What its own keys begin with.

    Example:
        >>> weight_key(nn.Linear(1, 1), "net.0.")
        'net.0.weight'
    """
    if not isinstance(module, WeightPart) or module.is_split:
        return prefix + "weight"
    owner, _, _ = prefix.removesuffix(".").rpartition(".")
    return f"{owner}.{module.view.parameter}".removeprefix(".")


def quantized_weight(module: FakeQuant) -> Tensor:
    """The weight of a fake-quant module as its forward pass uses it."""
    return rounding_state(module).rounded_weight(module.weight)


class _Linear(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(rounding_state(self).rounded_input(input), quantized_weight(self), self.bias)  # type: ignore[attr-defined]


class _Conv(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        output: Tensor = this._conv_forward(
            rounding_state(self).rounded_input(input), quantized_weight(self), this.bias
        )
        return output


class _ConvTranspose(FakeQuant):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        this: Any = self
        input = rounding_state(self).rounded_input(input)
        dims = len(this.kernel_size)
        extra = this._output_padding(
            input, output_size, this.stride, this.padding, this.kernel_size, dims, this.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return convolve(
            input, quantized_weight(self), this.bias, this.stride, this.padding, extra, this.groups, this.dilation
        )


class _Embedding(FakeQuant):
    def forward(self, input: Tensor) -> Tensor:
        this: Any = self
        return F.embedding(
            input,
            quantized_weight(self),
            this.padding_idx,
            this.max_norm,
            this.norm_type,
            this.scale_grad_by_freq,
            this.sparse,
        )


class _Part(FakeQuant):
    """What a part adds, whose weight another module may hand to torch itself."""

    @property
    def applied_weight(self) -> Tensor:
        """What inputs are multiplied by."""
        return quantized_weight(self)

    @property
    def rounds_input(self) -> bool:
        """Whether inputs are rounded before they are multiplied."""
        return rounding_state(self).input_grid is not None


class _LinearPart(_Part, _Linear):
    pass


class _TablePart(_Part, _Embedding):
    pass


_MIXINS: tuple[tuple[tuple[type[nn.Module], ...], type[FakeQuant]], ...] = (
    ((LinearPart,), _LinearPart),
    ((TablePart,), _TablePart),
    ((nn.Linear,), _Linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _Conv),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _ConvTranspose),
    ((nn.Embedding,), _Embedding),
)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fake_quant_class(base: type[nn.Module]) -> type[nn.Module]:
    """The fake-quant subclass of a module class.

    A user's subclass with a forward of its own keeps that forward: it finds the rounded weight under ``weight``, and is
    given its first argument rounded.

    Example:
        >>> fake_quant_class(nn.Linear).__name__
        'FakeQuantLinear'
    """
    if base in _classes:
        return _classes[base]
    bases, mixin = next((bases, mixin) for bases, mixin in _MIXINS if issubclass(base, bases))
    plain = any(base.forward is kind.forward for kind in bases)
    names: dict[str, Any] = {"__module__": __name__, "_lightning_caq_base": base}
    if not plain:
        names["forward"] = _own_forward(base)
    _classes[base] = type(f"FakeQuant{base.__name__}", (mixin if plain else FakeQuant, base), names)
    return _classes[base]


def _own_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class, run with the rounded weight and with its first argument rounded."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: FakeQuantState = rounding_state(self)
        args, kwargs = change_first(state.rounded_input, args, kwargs)
        if not state.quantizing:
            return base.forward(self, *args, **kwargs)
        with _holding(self, state.rounded_weight(self.weight)):
            return base.forward(self, *args, **kwargs)

    return forward


@contextmanager
def _holding(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """While open, the module finds another tensor under ``weight``; gradients reach its parameter through that."""
    parameters: Any = module._parameters
    own = parameters["weight"]
    try:
        parameters["weight"] = weight
        yield
    finally:
        parameters["weight"] = own


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = fake_quant_class(base)
    return cls.__new__(cls)


def on_grid(weight: Tensor, grid: Values) -> bool:
    """Whether every weight lies on one of the values, up to the rounding of the weight's own dtype."""
    weight = weight.detach()
    nearest = grid.nearest(weight)
    if torch.finfo(weight.dtype).bits < 32:  # its values are coarse, and a value of the grid is rounded to one of them
        return bool(torch.equal(nearest.to(weight.dtype), weight))
    return bool(((nearest - weight.float()).abs() <= grid.tolerance(weight.shape)).all())
