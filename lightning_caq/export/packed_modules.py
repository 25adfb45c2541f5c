"""Packed modules: they hold their weight in packed codes and unpack it whenever it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_caq.errors import LayerError
from lightning_caq.export.coded_weights import CodedWeight
from lightning_caq.export.packed_groups import PackedGroups
from lightning_caq.export.packed_table import PackedTable
from lightning_caq.network.parts.part import WeightPart
from lightning_caq.quantizers.fake_quant.modules import FakeQuant
from lightning_caq.quantizers.fake_quant.state import PREFIX
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.activations import InputGrid, change_first
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.grids.values import Values
from lightning_caq.quantizers.packing.channel_packing import pack_widths, unpack_widths
from lightning_caq.quantizers.packing.codes import pack_codes, unpack_codes


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the bytes that are counted.

    Attributes:
        bits: Bit-width; the largest one where channels differ.
        shape: Shape of the weight.
        codes: Packed codes, uint8, ⌈n · bits / 8⌉ bytes for the n codes of each width.
        scale: Step of the grid, in the type that it is stored in and in a shape that broadcasts to the weight.
        doubled_zero_point: Twice the code of zero, int16, same shape: zero points are multiples of one half.
        widths: Packed bit-widths of the channels, uint8, or ``None`` where all have ``bits``.
    """

    quantizer: ClassVar[str] = "affine"
    bits: int
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    doubled_zero_point: Tensor
    widths: Tensor | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return ("codes", "scale", "doubled_zero_point", *(() if self.widths is None else ("widths",)))

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> PackedWeight:
        """A weight, packed.

        Args:
            weight: The weight; it is rounded to the grid.
            grid: The grid.

        Raises:
            LayerError: If a zero point is no multiple of one half, or too large for 16 bits.

        Example:
            >>> grid = Grid(2, torch.tensor([[0.5]]), torch.tensor([[1.5]]))
            >>> packed = PackedWeight.of(torch.tensor([[-0.75, 0.25]]), grid)
            >>> packed.codes, packed.doubled_zero_point, packed.values()
            (tensor([8], dtype=torch.uint8), tensor([[3]], dtype=torch.int16), tensor([[-0.7500,  0.2500]]))
        """
        doubled = 2 * grid.zero_point
        if not torch.equal(doubled.to(torch.int16).to(doubled.dtype), doubled):
            raise LayerError(
                "A zero point cannot be stored: it must be a multiple of one half between -16384 and 16383.5."
            )
        packed = pack_codes(grid.codes(weight.detach()), grid)
        widths = None if grid.channel_bits is None else pack_widths(grid.channel_bits)
        return cls(grid.bits, tuple(weight.shape), packed, grid.scale, doubled.to(torch.int16), widths)

    @property
    def grid(self) -> Grid:
        """The grid."""
        channel_bits = None if self.widths is None else unpack_widths(self.widths, self.scale.shape)
        return Grid(self.bits, self.scale, self.doubled_zero_point / 2, channel_bits)

    def values(self) -> Tensor:
        """The weight, float32."""
        grid = self.grid
        return grid.values(unpack_codes(self.codes, grid, self.shape))

    def to(self, device: torch.device) -> PackedWeight:
        """The same on another device."""
        return replace(self, **{part: getattr(self, part).to(device) for part in self.parts})


PackedAlone = PackedWeight | PackedGroups | PackedTable
"""A weight whose codes are its own."""

AnyPacked = PackedAlone | CodedWeight


def pack_weight(weight: Tensor, values: Values) -> AnyPacked:
    """A weight, packed with what its values are made of."""
    if isinstance(values, SteppedGrid):
        return CodedWeight.of(weight, values)
    if isinstance(values, Grid):
        return (PackedWeight if values.group_size is None else PackedGroups).of(weight, values)
    return PackedTable.of(weight, values)


@dataclass(frozen=True)
class Layout:
    """What the parts of a packed weight do not say.

    Attributes:
        quantizer: Name of the quantizer.
        bits: Bit-width; the largest one where channels differ.
        shape: Shape of the weight.
        group_size: Weights that share a scale, or ``None`` where those of a channel do.
    """

    quantizer: str
    bits: int
    shape: tuple[int, ...]
    group_size: int | None = None


def layout_of(packed: PackedAlone) -> Layout:
    """The layout of a packed weight."""
    group_size = packed.group_size if isinstance(packed, PackedGroups) else None
    return Layout(packed.quantizer, packed.bits, packed.shape, group_size)


def packed_weight(layout: Layout, parts: Mapping[str, Tensor]) -> PackedAlone:
    """A packed weight from its parts.

    Raises:
        KeyError: If a part is missing.
    """
    bits, shape = layout.bits, layout.shape
    if layout.quantizer != "affine":
        return PackedTable(layout.quantizer, bits, shape, *(parts[name] for name in PackedTable.parts))
    if layout.group_size is not None:
        return PackedGroups(bits, shape, layout.group_size, *(parts[name] for name in PackedGroups.parts))
    codes, scale, zero = (parts[name] for name in ("codes", "scale", "doubled_zero_point"))
    return PackedWeight(bits, shape, codes, scale, zero, parts.get("widths"))


class Packed:
    """What every packed module adds to the class it replaces: ``weight`` is unpacked each time it is read.

    Such a module is for inference and for the floating-point type it had when it was packed. The parts of the packed
    weight are buffers; they and all else have names that no subclass uses.
    """

    _lightning_caq_base: ClassVar[type[nn.Module]]  # the class it replaces
    _lightning_caq_layout: tuple[Layout, torch.dtype]  # and the type of the weight
    _lightning_caq_input_grid: InputGrid | None

    @property
    def weight(self) -> Tensor:
        """The weight, made anew from its codes."""
        this: Any = self
        layout, dtype = self._lightning_caq_layout
        parts = {key.removeprefix(PREFIX): x for key, x in this._buffers.items() if key.startswith(PREFIX)}
        return packed_weight(layout, parts).values().to(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        this: Any = self
        for key in [key for key in this._buffers if key.startswith(PREFIX)]:
            part = key.removeprefix(PREFIX)  # the name of the buffer in earlier versions
            if prefix + part in state_dict and part not in this._buffers and part not in this._parameters:
                state_dict[prefix + key] = state_dict.pop(prefix + part)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # As for fake-quant modules: copies and pickles name the class that this one was made from.
        return _rebuild, (self._lightning_caq_base,), self.__dict__.copy()


class PackedPart(Packed):
    """What every packed part of a weight adds."""

    @property
    def weight(self) -> Tensor:
        """The weight, in the order in memory that it has in the parameter that it lay in, as products depend on it."""
        this: Any = self
        weight = super().weight
        return weight.mT.contiguous().mT if this.view.transposed else weight

    @property
    def rounds_input(self) -> bool:
        """Whether inputs are rounded before they are multiplied."""
        return self._lightning_caq_input_grid is not None


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def packed_class(base: type[nn.Module]) -> type[nn.Module]:
    """The packed subclass of a module class.

    Example:
        >>> packed_class(nn.Linear).__name__
        'PackedLinear'
    """
    if base not in _classes:
        names = {"__module__": __name__, "_lightning_caq_base": base, "forward": _rounding_forward(base)}
        packed = PackedPart if issubclass(base, WeightPart) else Packed
        _classes[base] = type(f"Packed{base.__name__}", (packed, base), names)
    return _classes[base]


def _rounding_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class, its first argument rounded where the module has a grid for it."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid = self._lightning_caq_input_grid
        if grid is not None:
            args, kwargs = change_first(grid.round, args, kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = packed_class(base)
    return cls.__new__(cls)


def pack_modules(
    model: nn.Module, weights: Mapping[str, PackedAlone], inputs: Mapping[str, InputGrid] | None = None
) -> None:
    """Turn modules into packed ones, in place; their float weights are let go.

    Args:
        model: The network, its modules in their plain classes.
        weights: Module name to packed weight; tied modules are given the same one and share its tensors.
        inputs: Module name to the grid of its input; other modules take their inputs as they are.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> grid = Grid(2, torch.tensor([[0.5]]), torch.tensor([[1.0]]))
        >>> pack_modules(net, {"": PackedWeight.of(torch.tensor([[-0.5, 1.0]]), grid)})
        >>> net, net(torch.ones(1, 2)), list(net.parameters())
        (PackedLinear(in_features=2, out_features=1, bias=False), tensor([[0.5000]]), [])
    """
    for name, packed in weights.items():
        module: Any = model.get_submodule(name)
        weight = module._parameters.pop("weight")
        module.__class__ = packed_class(type(module))
        module._lightning_caq_layout = (layout_of(packed), weight.dtype)
        module._lightning_caq_input_grid = (inputs or {}).get(name)
        for part in packed.parts:
            module.register_buffer(PREFIX + part, getattr(packed, part))


def check_quantized(model: nn.Module) -> dict[str, FakeQuant]:
    """The fake-quant modules of a network that is about to be exported, by name.

    Raises:
        LayerError: If there are none, or if one does not run on its grid.
    """
    name = type(model).__name__
    if any(isinstance(module, Packed) for module in model.modules()):
        raise LayerError(f"{name} was loaded with packed=True; load its file without it to export the network again.")
    modules = quantized_modules(model)
    if not modules:
        raise LayerError(f"{name} has no quantized layer; run quantize() on it, or apply a plan, first.")
    return modules
