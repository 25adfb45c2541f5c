"""Packed files: a quantized network in one safetensors file of the size that its plan promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_caq.errors import LayerError, OptionError, PlanError
from lightning_caq.export.coded_weights import CodedWeight, coded_tensors, coded_weights
from lightning_caq.export.packed_groups import PackedGroups
from lightning_caq.export.packed_modules import (
    AnyPacked,
    Layout,
    PackedAlone,
    check_quantized,
    pack_modules,
    pack_weight,
    packed_weight,
)
from lightning_caq.export.packed_table import PackedTable
from lightning_caq.export.sealed import read_sealed, sealed, write_sealed
from lightning_caq.network.layers import kind_of
from lightning_caq.network.parts.expand import expanded, split_weights
from lightning_caq.network.parts.part import WeightPart
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import restore_modules, swap
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.groups import count_groups
from lightning_caq.quantizers.grids.levels import levels
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.grids.values import QUANTIZERS
from lightning_caq.sizes import Width, code_bytes, zero_point_bits

_TYPES = {
    "codes": (torch.uint8,),
    "scale": (torch.float32, torch.float16, torch.bfloat16),
    "doubled_zero_point": (torch.int16,),
    "zero_points": (torch.uint8,),
    "widths": (torch.uint8,),
    "basis": (torch.float32,),
}


OtherType = Literal["float16"] | None
"""What statistics and biases are rounded to in a file, if to anything."""


def save_quantized(model: nn.Module, path: str | Path, *, other_dtype: OtherType = None) -> Path:
    """Write a quantized network into one file, its weights packed at their bit-width.

    The file holds, for every quantized weight, ⌈n b / 8⌉ bytes of codes, a scale and a 16-bit zero point a channel (and
    three bits where channels differ in their bits), or a scale and a zero point of b + 1 bits a group, scales in the
    type that they were fitted in, or the float32 numbers that its table is made of; every other parameter and buffer of
    the state dict as it is; and the bit-widths, the grids of inputs and a fingerprint of the whole file. Entropy-coded
    weights are one stream, and a step each. Tied weights are stored
    once. Nothing is pickled.

    Args:
        model: The quantized network.
        path: The file, such as ``net.safetensors``.
        other_dtype: ``"float16"`` rounds float32 statistics, biases and scales of norms to half precision in the file,
            as far as they lie in its range. The network that is loaded has the rounded ones, each off by less than one
            part in two thousand, and the outputs that come of them. ``None`` keeps every bit.

    Returns:
        The path.

    Raises:
        OptionError: If ``other_dtype`` is something else.
        LayerError: If the network is not quantized, holds weights that are not on their grids, or state that is no
            tensor.

    Example:
        >>> import copy, tempfile
        >>> from lightning_caq import quantize
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> fresh, x = copy.deepcopy(net), torch.randn(64, 8)
        >>> _ = quantize(net, [x], avg_bits=3)
        >>> path = save_quantized(net, f"{tempfile.mkdtemp()}/net.safetensors")
        >>> torch.equal(load_quantized(fresh, path)(x), net(x))
        True
    """
    check_other_dtype(other_dtype)
    return write_sealed(path, *_contents(model, halve=other_dtype is not None))


def check_other_dtype(other_dtype: Any) -> None:
    """Refuse what statistics and biases cannot be rounded to.

    Raises:
        OptionError: If it is neither ``"float16"`` nor ``None``.
    """
    if other_dtype not in (None, "float16"):
        raise OptionError(f"other_dtype={other_dtype!r} is not known; give 'float16', or None to keep every bit.")


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of the file that ``save_quantized`` would write.

    Example:
        >>> from lightning_caq import quantize
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = quantize(net, [torch.randn(64, 8)], avg_bits=3, guard=False)
        >>> quantized_bytes(net) > 8 * 16 * 3 / 8
        True
    """
    return len(sealed(*_contents(model)))


def _contents(model: nn.Module, *, halve: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a quantized network."""
    modules = check_quantized(model)
    with split_weights(model):
        return _described(model, modules, halve=halve)


def _described(
    model: nn.Module, modules: Mapping[str, FakeQuant], *, halve: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = _state(model)
    tied = _tied(state)
    names: dict[str, list[str]] = {}
    for name, module in modules.items():
        rounding = rounding_state(module)
        if not (rounding.quantizing and on_grid(module.weight, rounding.grid)):
            raise LayerError(
                f"Layer '{name}' holds weights that are not on its grid: it was trained on, or loaded from a float "
                "checkpoint. Snap it with plan.settled(model), or quantize again; then save."
            )
        key = f"{name}.weight".lstrip(".")
        names.setdefault(tied.get(key, key), []).append(name)
    layers, weights, tensors = [], [], {key: x for key, x in state.items() if key not in tied and key not in names}
    for key, tied_modules in names.items():
        module = modules[tied_modules[0]]
        rounding, dtype = rounding_state(module), str(module.weight.dtype)
        packed, inputs = pack_weight(module.weight, rounding.grid), rounding.input_grid
        transposed = packed.grid.transposed if isinstance(packed, CodedWeight) else 0
        layer = _Layer(
            key=key,
            modules=tuple(tied_modules),
            bits=packed.bits if isinstance(packed.bits, int) else round(packed.bits, 3),
            shape=packed.shape,
            dtype=dtype,
            input_grid=inputs,
            quantizer=packed.quantizer,
            transposed=transposed,
            group_size=packed.group_size if isinstance(packed, PackedGroups) else None,
        )
        layers.append(layer)
        weights.append(packed)
        tensors |= {f"{key}.{part}": getattr(packed, part) for part in packed.parts}
    tensors |= coded_tensors([x for x in weights if isinstance(x, CodedWeight)])
    halved = [key for key in tensors if key in state and _keeps_in_half(tensors[key])] if halve else []
    tensors |= {key: tensors[key].detach().half() for key in halved}
    described = [x.described() for x in layers]
    return {"network": type(model).__name__, "layers": described, "tied": tied, "halved": halved}, tensors


def _keeps_in_half(tensor: Tensor) -> bool:
    """Whether a vector of float32 numbers lies in the range in which half precision rounds by 2⁻¹¹ at most."""
    if tensor.ndim > 1 or tensor.dtype != torch.float32:
        return False
    return bool(((tensor.half() - tensor).abs() <= 2**-11 * tensor.abs()).all())


def load_quantized(model: nn.Module, path: str | Path, *, packed: bool = False) -> nn.Module:
    """Fill a network from a file of ``save_quantized``; its outputs are then those of the network that was saved.

    Nothing in the network changes before the whole file has been checked.

    Args:
        model: A network of the same architecture, plain or quantized, on any device; its weights do not matter.
        path: The file.
        packed: Keep the weights packed in memory too and unpack them in every forward pass: less memory, more time, for
            inference only, and not for entropy-coded weights, which are decoded once. By default the network becomes
            the fake-quant one that was saved.

    Returns:
        The network that was given.

    Raises:
        PlanError: If the file is missing, truncated, changed, of a newer format or of another network.
        LayerError: If the weights are entropy-coded and shall stay packed.
    """
    description, tensors = read_sealed(path)
    try:
        tensors |= {key: tensors[key].float() for key in description.get("halved", ())}
        layers = [_Layer.read(x) for x in description["layers"]]
        weights = _take_all(tensors, layers)
        tied = dict(description["tied"])
    except (KeyError, TypeError, ValueError, OptionError) as error:
        raise PlanError(f"{path} is damaged: {type(error).__name__} {error}. Save it again.") from error
    if packed and any(x.quantizer == SteppedGrid.quantizer for x in layers):
        raise LayerError(
            f"The weights in {path} are entropy-coded: they are decoded once, as a whole, and cannot stay packed in "
            "memory. Load them with packed=False, or quantize with coding='fixed'."
        )
    with expanded(model, [name for x in layers for name in x.modules]), split_weights(model):
        live = _checked(model, layers, tied, tensors, path)
        if packed:
            _check_inputs_of_functions(model, layers)
        weights = {key: weight.to(live[key].device) for key, weight in weights.items()}
        restore_modules(model)
        with torch.no_grad():
            for key, tensor in (*tensors.items(), *((key, weight.values()) for key, weight in weights.items())):
                live[key].copy_(tensor)
        by_module = {name: weights[x.key] for x in layers for name in x.modules}
        inputs = {name: x.input_grid for x in layers if x.input_grid is not None for name in x.modules}
        if packed:
            pack_modules(model, {k: x for k, x in by_module.items() if not isinstance(x, CodedWeight)}, inputs)
        else:
            swap(model, {name: weight.grid for name, weight in by_module.items()}, inputs)
    return model


def _check_inputs_of_functions(model: nn.Module, layers: Sequence[_Layer]) -> None:
    """Refuse to keep codes where a function is given a weight unpacked, and nobody rounds its input."""
    for layer in layers:
        for name in layer.modules if layer.input_grid is not None else ():
            module = model.get_submodule(name)
            if isinstance(module, WeightPart) and module.view.shared and "." in module.view.parameter:
                raise LayerError(
                    f"'{name}' stands for a function that uses the weight of another layer, and rounds its input: that "
                    "cannot stay packed in memory. Load the file with packed=False."
                )


@dataclass(frozen=True)
class _Layer:
    """One quantized weight as the file describes it: state-dict key, modules that hold it, and how it is stored."""

    key: str
    modules: tuple[str, ...]
    bits: int | float
    shape: tuple[int, ...]
    dtype: str
    input_grid: InputGrid | None = None
    quantizer: str = "affine"
    transposed: int = 0
    group_size: int | None = None

    def described(self) -> dict[str, Any]:
        """The layer as the file says it; nothing of groups where there are none."""
        grouped = self.group_size is not None
        return {name: value for name, value in asdict(self).items() if name != "group_size" or grouped}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> _Layer:
        """A layer from what the file says of it."""
        grid = data.get("input_grid")
        input_grid = None if grid is None else InputGrid(**grid)
        return cls(
            **{**data, "modules": tuple(data["modules"]), "shape": tuple(data["shape"]), "input_grid": input_grid}
        )


def _take_all(tensors: dict[str, Tensor], layers: Sequence[_Layer]) -> dict[str, AnyPacked]:
    """Take the tensors of all layers out of the file's; state-dict key to packed weight."""
    coded = [x for x in layers if x.quantizer == SteppedGrid.quantizer]
    weights: dict[str, AnyPacked] = {x.key: _take(tensors, x) for x in layers if x not in coded}
    if coded:
        found = coded_weights(
            tensors,
            shapes=[x.shape for x in coded],
            bits=[x.bits for x in coded],
            transposed=[x.transposed for x in coded],
        )
        weights |= {x.key: weight for x, weight in zip(coded, found, strict=True)}
    return weights


def _take(tensors: dict[str, Tensor], layer: _Layer) -> PackedAlone:
    """Take the tensors of a layer out of the file's."""
    if layer.quantizer not in QUANTIZERS:
        raise TypeError(f"'{layer.key}' was quantized by {layer.quantizer!r}, which is not known")
    names = [part for part in _TYPES if f"{layer.key}.{part}" in tensors]
    parts = {part: tensors.pop(f"{layer.key}.{part}") for part in names}
    try:
        packed = packed_weight(Layout(layer.quantizer, int(layer.bits), layer.shape, layer.group_size), parts)
    except KeyError as error:
        raise KeyError(f"{layer.key}.{error.args[0]}") from error
    count = int(torch.Size(layer.shape).numel())
    width, channels, fits = _fit(packed, count)
    if (
        not fits
        or packed.codes.shape != (code_bytes(width, count),)
        or len(channels) != len(layer.shape)
        or any(size not in (1, whole) for size, whole in zip(channels, layer.shape, strict=True))
        or any(tensor.dtype not in _TYPES[part] for part, tensor in parts.items())
    ):
        raise TypeError(f"the tensors of '{layer.key}' do not fit its shape {list(layer.shape)}")
    return packed


def _fit(packed: PackedAlone, count: int) -> tuple[Width, Sequence[int], bool]:
    """Bits of a packed weight, the shape of its channels, and whether its parts fit each other."""
    if isinstance(packed, PackedTable):
        *channels, columns = packed.basis.shape
        return packed.bits, channels, columns == len(levels(packed.quantizer, packed.bits))
    if isinstance(packed, PackedGroups):
        *channels, groups = packed.scale.shape
        columns = count // max(torch.Size(channels).numel(), 1)
        stored = zero_point_bits(packed.scale.numel(), packed.bits) // 8
        fits = groups == count_groups(columns, packed.group_size) and packed.zero_points.shape == (stored,)
        return packed.bits, channels, fits
    return packed.grid.width, packed.scale.shape, packed.scale.shape == packed.doubled_zero_point.shape


def _checked(
    model: nn.Module, layers: list[_Layer], tied: Mapping[str, str], others: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """The live tensors of a network that the file fits."""
    name = type(model).__name__
    wrong = f"{path} belongs to another network"
    if any(is_lazy(x) or x.is_meta for x in (*model.parameters(), *model.buffers())):
        raise PlanError(
            f"{name} has parameters without values; run one batch through its lazy layers, or call "
            "model.to_empty(device='cpu'), first."
        )
    try:
        live = _state(model)
    except LayerError as error:
        raise PlanError(f"{wrong}: {error}") from error
    stored = {x.key: (x.shape, x.dtype) for x in layers}
    stored |= {key: (tuple(x.shape), str(x.dtype)) for key, x in others.items()}
    stored |= {key: stored[owner] for key, owner in tied.items() if owner in stored}
    if lacking := sorted(stored.keys() - live.keys()):
        raise PlanError(f"{wrong}: it has {_some(lacking)}, which {name} lacks. Build the network that was saved.")
    if lacking := sorted(live.keys() - stored.keys()):
        raise PlanError(f"{wrong}: it lacks {_some(lacking)}, which {name} has. Build the network that was saved.")
    for key, (shape, dtype) in stored.items():
        if (tuple(live[key].shape), str(live[key].dtype)) != (shape, dtype):
            raise PlanError(
                f"{wrong}: it has '{key}' as {dtype} {list(shape)}, {name} as {live[key].dtype} "
                f"{list(live[key].shape)}. Build the network that was saved, in its floating-point type."
            )
    if _tied(live) != tied:
        raise PlanError(f"{wrong}: other tensors are tied in it than in {name}. Build the network that was saved.")
    modules = dict(model.named_modules(remove_duplicate=False))
    for x in layers:
        for module in x.modules:
            if module not in modules or kind_of(modules[module]) is None:
                raise PlanError(f"{wrong}: in it '{module}' is a layer that can be quantized, in {name} it is not.")
    return live


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters and buffers by state-dict key."""
    state = dict(model.state_dict(keep_vars=True))
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise LayerError(
                f"{type(model).__name__} holds state that is no tensor, '{key}': a {type(value).__name__}. "
                "Such a file holds tensors only; remove that state first."
            )
    return state


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys of tensors that an earlier key names too, with that key."""
    first: dict[int, str] = {}
    return {key: first[id(x)] for key, x in state.items() if first.setdefault(id(x), key) != key}


def _some(names: Iterable[str]) -> str:
    """Three names at most."""
    listed = [f"'{name}'" for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
