"""The plan: bits, scales and codes of every layer. It is what is saved, and what makes a network quantized."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lightning_caq.errors import OptionError, PlanError
from lightning_caq.network.parts.expand import expanded
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import swap
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.grids.values import STORED, Values, from_numbers, numbers
from lightning_caq.quantizers.packing.coded import layer_bits
from lightning_caq.quantizers.packing.codes import pack_codes, unpack_codes
from lightning_caq.sizes import FLOAT_BITS, LayerSizes, Width, average_bits, code_bytes
from lightning_caq.utilities.fingerprint import fingerprint

VERSION = 2  # 1 had a byte for each code
SCHEME = "affine, per output channel"
GROUPED = "affine, per group of an output channel's weights"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is stored.

    Attributes:
        name: Module name of the layer.
        modules: Every module name under which the weight is reached.
        grid: Bit-width, scales and zero points, a codebook, or a step.
        codes: Codes of the weights in the shape of the weight, uint8; int32 where they have no bit-width.
        input_grid: Grid that the layer's input is rounded to, or ``None``.
        distortion: Where codes were entropy-coded, the mean squared error of a weight by which they are compared with
            the limit, see ``rate_limit``; it is not saved.
    """

    name: str
    modules: tuple[str, ...]
    grid: Values
    codes: Tensor
    input_grid: InputGrid | None = None
    distortion: float | None = None

    @property
    def values(self) -> Tensor:
        """The rounded weight, float32."""
        return self.grid.values(self.codes)

    @property
    def scales(self) -> int:
        """Number of scales, or of the numbers that a table is made of."""
        return next(iter(numbers(self.grid).values())).numel()


def coded(layers: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """Layers whose entropy-coded ones know how many bits their codes take once coded together."""
    grids = {x.name: x.grid for x in layers if isinstance(x.grid, SteppedGrid)}
    codes = [x.codes for x in layers if x.name in grids]
    bits = dict(zip(grids, layer_bits(codes, [grid.transposed for grid in grids.values()]), strict=True))
    return tuple(replace(x, grid=replace(grids[x.name], bits=bits[x.name])) if x.name in bits else x for x in layers)


@dataclass(frozen=True, repr=False)
class QuantizationPlan:
    """A quantized network, apart from its architecture.

    Attributes:
        method: The method that allocated the bits.
        budget: The budget in words, such as ``"avg_bits=3"``.
        rounding: The rounding that chose the codes.
        layers: One entry a layer, in order of execution.
        sizes: Numbers of weights and channels, by which size is counted.
        fingerprint: Fingerprint of the float weights the plan was made for.
        repairs: State-dict entries that repair changed: batch-norm statistics and biases.
    """

    method: str
    budget: str
    rounding: str
    layers: tuple[LayerPlan, ...]
    sizes: LayerSizes
    fingerprint: str
    repairs: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The plan in lines, one a layer, without its tensors."""
        head = f"{self.method} with {self.budget}: {self.avg_bits:.2f} bits on average, {self.ratio:.1f}x smaller"
        rows = [f"  {name}: {b:g} bits" for name, b in self.bits.items()]
        return "\n".join([f"QuantizationPlan({head})", *rows])

    @property
    def widths(self) -> dict[str, Width]:
        """Layer name to bit-width, or to that of each of its channels; without entropy-coded layers."""
        return {layer.name: layer.grid.width for layer in self.layers if not isinstance(layer.grid, SteppedGrid)}

    @property
    def bits(self) -> dict[str, int | float]:
        """Layer name to bit-width; to the average where its channels differ or its codes are entropy-coded."""
        return {layer.name: average_bits(layer.grid.width) for layer in self.layers}

    @property
    def activation_bits(self) -> dict[str, int]:
        """Layer name to the bit-width of its input; layers that take their inputs as they are have no entry."""
        return {layer.name: layer.input_grid.bits for layer in self.layers if layer.input_grid is not None}

    @property
    def avg_bits(self) -> float:
        """Average bits of a quantized weight, Σ n_i b_i / Σ n_i; scales are not counted."""
        return self.sizes.avg_bits(list(self.bits.values()))

    @property
    def ratio(self) -> float:
        """Float32 size over quantized size of the weights; scales, zero points and excluded layers are counted."""
        return self.sizes.ratio(list(self.bits.values()))

    @property
    def memory_ratio(self) -> float | None:
        """Size that the float network's weights took in memory over quantized size; ``None`` if that was in float32."""
        return self.sizes.memory_ratio(list(self.bits.values()))

    @property
    def bytes(self) -> int:
        """Bytes of the weights, scales and zero points or tables, excluded layers in float32 counted.

        They are those of the file that ``save_quantized`` writes: the weights of each layer begin with a new byte, and
        so do those of each bit-width in it.
        """
        weights = sum(code_bytes(x.grid.width, n) for n, x in zip(self.sizes.weights, self.layers, strict=True))
        values = self.sizes.overhead + self.sizes.tables(list(self.bits.values()))
        return weights + values // 8 + self.sizes.unquantized_bits // 8

    def apply(self, model: nn.Module) -> None:
        """Make a network quantized: write the rounded weights and the repairs, and swap in fake-quant modules.

        Args:
            model: The network the plan was made for, with its float weights or with its rounded ones.

        Raises:
            PlanError: If it is another network or holds other weights; the network is then untouched.
        """
        with self._expanded(model):
            if not self._holds_rounded_weights(model) and self._fingerprint_of(model) != self.fingerprint:
                raise PlanError(
                    f"The plan was made for other weights than those in {type(model).__name__}: those at the end of "
                    "training, which may not be those of the best epoch. Load the last float checkpoint of that run "
                    "(last.ckpt), or the quantized network itself, from quantized.ckpt or with load_quantized from "
                    "network.safetensors; or quantize again."
                )
            self.write(model)

    def write(self, model: nn.Module) -> None:
        """What ``apply`` does, without its checks: for the very network that the plan was made of."""
        with torch.no_grad():
            for layer in self.layers:
                _weight(model, layer).copy_(layer.values)
            for name, tensor in _entries(model, self.repairs):
                tensor.copy_(self.repairs[name])
        swap(model, self.grids(), self.input_grids())

    def attach(self, model: nn.Module) -> bool:
        """Swap in fake-quant modules if the network already holds weights on the plan's grids.

        Meant for a network that was just filled from a checkpoint. Weights are not changed.

        Returns:
            Whether the modules were swapped; ``False`` leaves the network as it was.

        Raises:
            PlanError: If the plan belongs to another network.
        """
        with self._expanded(model):
            if not all(on_grid(_weight(model, x), x.grid.to(_weight(model, x).device)) for x in self.layers):
                return False
            swap(model, self.grids(), self.input_grids())
            return True

    def settled(self, model: nn.Module) -> QuantizationPlan:
        """The plan after the swapped network was trained on: its weights are snapped to their grids, in place.

        Returns:
            A plan with the new codes for the same bits, and the scales if they were learned, made for the weights that
            the network now holds.
        """
        layers = []
        with self._expanded(model), torch.no_grad():
            for layer in self.layers:
                weight = _weight(model, layer)
                grid, input_grid = _learned(model, layer)
                codes = grid.codes(weight)
                weight.copy_(grid.values(codes))
                codes = codes.to("cpu", layer.codes.dtype)
                layers.append(replace(layer, grid=grid.to("cpu"), codes=codes, input_grid=input_grid))
        repairs = {name: tensor.detach().cpu().clone() for name, tensor in _entries(model, self.repairs)}
        return replace(self, layers=coded(layers), repairs=repairs, fingerprint=self._fingerprint_of(model))

    def cpu(self) -> QuantizationPlan:
        """The plan with its tensors on the CPU."""
        layers = tuple(replace(x, grid=x.grid.to("cpu"), codes=x.codes.cpu()) for x in self.layers)
        return replace(self, layers=layers, repairs={name: tensor.cpu() for name, tensor in self.repairs.items()})

    def grids(self) -> dict[str, Values]:
        """Module name to grid, tied modules included."""
        return {name: layer.grid for layer in self.layers for name in layer.modules}

    def input_grids(self) -> dict[str, InputGrid]:
        """Module name to the grid of its input, tied modules included; those without one are missing."""
        return {name: x.input_grid for x in self.layers if x.input_grid is not None for name in x.modules}

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON that people can read, with its tensors in a safetensors file beside it, codes packed.

        Args:
            path: Where the JSON goes, such as ``plan.json``; the tensors go to ``plan.safetensors``. A name without
                either ending gets both.

        Returns:
            The path of the JSON file.
        """
        path = _json_path(path)
        payload = save_tensors(self._tensors())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".safetensors").write_bytes(payload)
        path.write_text(json.dumps(self._description(), indent=1))
        return path

    @classmethod
    def load(cls, path: str | Path) -> QuantizationPlan:
        """Read a plan that ``save`` wrote.

        Raises:
            PlanError: If a file is missing, damaged, not of the pair, or of a newer format.
        """
        path = _json_path(path)
        try:
            description = json.loads(path.read_text())
            tensors = load_tensors(path.with_suffix(".safetensors").read_bytes())
        except OSError as error:
            raise PlanError(
                f"Plan {path} cannot be read: {error.strerror} ({error.filename}). A plan is two files side by side, "
                "one ending in .json and one in .safetensors."
            ) from error
        except (ValueError, SafetensorError) as error:
            raise PlanError(f"Plan {path} or its tensors are damaged: {error}.") from error
        return cls._build(description, tensors, str(path))

    def state_dict(self) -> dict[str, Any]:
        """The plan as plain containers and tensors, which ``torch.load(weights_only=True)`` accepts."""
        return {**self._description(), "tensors": self._tensors()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> QuantizationPlan:
        """The plan that ``state_dict`` gave.

        Raises:
            PlanError: If entries are missing or of a newer format.
        """
        return cls._build(state, state.get("tensors", {}), "in the checkpoint")

    def _description(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "scheme": self._scheme,
            "method": self.method,
            "budget": self.budget,
            "rounding": self.rounding,
            "avg_bits": self.avg_bits,
            "ratio": self.ratio,
            "fingerprint": self.fingerprint,
            "tensors_fingerprint": fingerprint(self._tensors()),
            "sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.sizes).items()},
            "layers": [_describe(layer) for layer in self.layers],
            "repairs": sorted(self.repairs),
        }

    @property
    def _scheme(self) -> str:
        if self.sizes.quantizer != "affine":
            return self.sizes.quantizer
        return GROUPED if self.sizes.groups else SCHEME

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"repair/{name}": tensor for name, tensor in self.repairs.items()}
        for layer in self.layers:
            tensors[f"codes/{layer.name}"] = pack_codes(layer.codes, layer.grid)
            tensors |= {f"{part}/{layer.name}": tensor for part, tensor in numbers(layer.grid).items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def _build(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> QuantizationPlan:
        version = data.get("version") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise PlanError(f"Plan {where} is not a quantization plan: it has no version.")
        if version > VERSION:
            raise PlanError(f"Plan {where} has format {version}; this version of lightning-caq reads up to {VERSION}.")
        try:
            if fingerprint(tensors) != data["tensors_fingerprint"]:
                raise PlanError(f"Plan {where} and its tensors do not belong together; save the plan again.")
            layers = tuple(_layer(x, tensors, version) for x in data["layers"])
            counts = data["sizes"]
            sizes = LayerSizes(
                tuple(counts["weights"]),
                tuple(counts["channels"]),
                counts["unquantized"],
                macs=tuple(counts.get("macs", ())),  # plans of earlier versions do not have these
                activation_bits=tuple(counts.get("activation_bits", ())),
                widths=counts.get("widths", 0),
                quantizer=counts.get("quantizer", "affine"),
                memory=counts.get("memory", 0),
                unquantized_memory=counts.get("unquantized_memory", 0),
                groups=tuple(counts.get("groups", ())),
                scale_bits=counts.get("scale_bits", FLOAT_BITS),
            )
            repairs = {name: tensors[f"repair/{name}"] for name in data["repairs"]}
            return cls(data["method"], data["budget"], data["rounding"], layers, sizes, data["fingerprint"], repairs)
        except (KeyError, TypeError, ValueError, OptionError) as error:
            raise PlanError(f"Plan {where} is damaged: {type(error).__name__} {error}.") from error

    @contextmanager
    def _expanded(self, model: nn.Module) -> Iterator[None]:
        """While open, a network that the plan belongs to has all of its layers, those inside other modules too."""
        with expanded(model, self.grids().keys()):
            self._check_architecture(model)
            yield

    def _check_architecture(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        for layer in self.layers:
            for name in layer.modules:
                weight = getattr(modules.get(name), "weight", None)
                if not isinstance(weight, Tensor) or weight.shape != layer.codes.shape:
                    has = "no such layer" if not isinstance(weight, Tensor) else f"a weight {list(weight.shape)} there"
                    raise PlanError(
                        f"The plan belongs to another network: it has layer '{name}' with a weight "
                        f"{list(layer.codes.shape)}, {type(model).__name__} has {has}."
                    )
        state = model.state_dict()
        for name, tensor in self.repairs.items():
            if name not in state or state[name].shape != tensor.shape:
                raise PlanError(
                    f"The plan belongs to another network: {type(model).__name__} has no '{name}' of its shape."
                )

    def _holds_rounded_weights(self, model: nn.Module) -> bool:
        return all(
            torch.equal(_weight(model, x).detach().cpu(), x.values.cpu().to(_weight(model, x).dtype))
            for x in self.layers
        )

    def _fingerprint_of(self, model: nn.Module) -> str:
        return weights_fingerprint(model, [x.name for x in self.layers])


def _describe(layer: LayerPlan) -> dict[str, Any]:
    """A layer without its tensors."""
    return {
        "name": layer.name,
        "modules": list(layer.modules),
        "bits": layer.grid.bits,
        "quantizer": layer.grid.quantizer,
        "shape": list(layer.codes.shape),
        "transposed": layer.grid.transposed if isinstance(layer.grid, SteppedGrid) else 0,
        "group_size": layer.grid.group_size if isinstance(layer.grid, Grid) else None,
        "input": None if layer.input_grid is None else asdict(layer.input_grid),
    }


def _layer(described: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int) -> LayerPlan:
    """A layer from its description and its tensors."""
    name = described["name"]
    parts = {part: tensors[f"{part}/{name}"] for part in STORED if f"{part}/{name}" in tensors}
    grid = from_numbers(
        described.get("quantizer", "affine"),
        described["bits"],
        parts,
        transposed=described.get("transposed", 0),
        group_size=described.get("group_size"),
    )
    codes = tensors[f"codes/{name}"]
    return LayerPlan(
        name,
        tuple(described["modules"]),
        grid,
        codes if version == 1 else unpack_codes(codes, grid, tuple(described["shape"])),
        InputGrid(**described["input"]) if described.get("input") else None,
    )


def weights_fingerprint(model: nn.Module, names: list[str]) -> str:
    """Fingerprint of the weights of the named layers."""
    return fingerprint({name: model.get_submodule(name).weight for name in names})  # type: ignore[misc]


def _json_path(path: str | Path) -> Path:
    """The JSON file of a pair.

    Example:
        >>> print(_json_path("plan.safetensors"), _json_path("plan-2.5"))
        plan.json plan-2.5.json
    """
    path = Path(path)
    return path.with_suffix(".json") if path.suffix in (".json", ".safetensors") else Path(f"{path}.json")


def _weight(model: nn.Module, layer: LayerPlan) -> Tensor:
    weight = model.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)
    return weight


def _learned(model: nn.Module, layer: LayerPlan) -> tuple[Values, InputGrid | None]:
    """The values and the grid of the input of a layer, as its module has them if it is swapped."""
    module = model.get_submodule(layer.name)
    if not isinstance(module, FakeQuant):
        return layer.grid.to(_weight(model, layer).device), layer.input_grid
    state = rounding_state(module)
    return state.grid.to(_weight(model, layer).device), state.learned_input_grid if layer.input_grid else None


def _entries(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Live parameters and buffers by their state-dict keys."""
    live = dict(model.state_dict(keep_vars=True))
    for name in names:
        yield name, live[name]
