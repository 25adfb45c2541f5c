"""ONNX: a quantized network as a graph that stock runtimes run, its weights stored as integers.

The network is traced with its quantized weights as inputs, so that nothing the exporter does, such as folding or
transposing constants, can touch them. Each such input is then replaced by integers and a DequantizeLinear node. Where
the input of a layer is rounded, a node of our own stands in the trace; QuantizeLinear and DequantizeLinear take its
place.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_caq.errors import ExportError
from lightning_caq.export.integers import Integers, to_integers
from lightning_caq.export.onnx_graph import DOMAIN, ROUND_INPUT, dequantize_input, quantize_rounded
from lightning_caq.export.packed_modules import check_quantized
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, quantized_weight
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.grids.activations import InputGrid, change_first
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.structures import describe

OPSET = 21  # the first with 4-bit types
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Largest difference from PyTorch's outputs, relative to the largest of them: sums in another order, no more.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where inputs are rounded, a value half-way between two codes, up to such differences, may fall to either side. Few do:
# what that changes has to stay below this part of what the rounding of all inputs changes.
_FLIPS = 0.5


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote.

    Attributes:
        path: The file.
        types: Integer type of every quantized weight by state-dict key, such as ``{"conv1.weight": "uint4"}``.
        notes: What was stored wider than its bit-width, and why.
        difference: Largest difference between ONNX Runtime's and PyTorch's outputs for the example input.
    """

    path: Path
    types: dict[str, str]
    notes: tuple[str, ...]
    difference: float


def export_onnx(
    model: nn.Module, path: str | Path, example_input: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
) -> OnnxExport:
    """Write a quantized network as ONNX (opset 21) with integer weights, and check it in ONNX Runtime.

    Weights are uint4 or uint8 with one scale and zero point a channel (DequantizeLinear); other bit-widths are stored
    in the next larger type that holds them. Dequantized weights equal PyTorch's to the last bit. Inputs that are
    rounded pass through QuantizeLinear and DequantizeLinear in uint8, after a Clip if their grid has fewer codes. The
    network is exported in eval mode; the first dimension of every input may vary where the network allows it.

    Args:
        model: The quantized network; left as it was.
        path: The file, such as ``net.onnx``.
        example_input: An input: a tensor, a tuple of positional arguments, or a dict of keyword arguments of
            ``forward``. Outputs are compared on it.

    Returns:
        The path, the types, and notes on what was widened.

    Raises:
        LayerError: If the network is not quantized.
        ExportError: If packages of the extra ``onnx`` are missing, the network cannot take the example or holds an
            operator that ONNX or ONNX Runtime lacks, or the outputs differ by more than rounding; no file is then
            written.

    Example:
        >>> import pytest, tempfile
        >>> _ = [pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript")]
        >>> from lightning_caq import quantize
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = quantize(net, [torch.randn(64, 8)], avg_bits=8, rounding="nearest")
        >>> export_onnx(net, f"{tempfile.mkdtemp()}/net.onnx", torch.randn(2, 8)).difference < 1e-5
        True
    """
    modules = check_quantized(model)
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ExportError(f"export_onnx needs {', '.join(missing)}; run pip install 'lightning-caq[onnx]'.")
    if any(rounding_state(module).input_grid is not None for module in modules.values()) and not hasattr(
        torch.onnx, "ops"
    ):
        raise ExportError("Rounded activations are exported by torch 2.8 and later; install a newer torch.")
    args, kwargs, names = _arguments(model, example_input)
    weights = _weights(model, modules)
    integers = {key: to_integers(quantized_weight(module), _affine(key, module)) for key, module in weights.items()}
    with preserved(model), torch.no_grad():
        output = _output(model, args, kwargs)
        expected = _tensors(output)
        with _inputs_kept(modules):
            kept = _tensors(_output(model, args, kwargs))
        flips = [_FLIPS * _largest(a - b) for a, b in zip(expected, kept, strict=True)]
        with _opened(modules):
            proto = _traced(model, weights, args, kwargs, names, _output_names(output, len(expected)))
    for key, stored in integers.items():
        dequantize_input(proto.graph, key, stored)
    quantize_rounded(proto)
    payload, difference = _checked(proto, [*args, *kwargs.values()], expected, flips)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)
    notes = _notes({key: rounding_state(module).bits for key, module in weights.items()}, integers)
    return OnnxExport(path, {key: stored.type for key, stored in integers.items()}, notes, difference)


class _Opened(nn.Module):
    """A network whose quantized weights are inputs."""

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model, self.keys = model, tuple(keys)

    def forward(self, weights: list[Tensor], args: list[Tensor], kwargs: dict[str, Tensor]) -> Any:
        return functional_call(self.model, dict(zip(self.keys, weights, strict=True)), tuple(args), kwargs)


def _weights(model: nn.Module, modules: Mapping[str, FakeQuant]) -> dict[str, FakeQuant]:
    """One module for every quantized weight, by the weight's state-dict key; tied ones once."""
    seen: dict[int, None] = {}
    weights = {}
    for name, module in modules.items():
        if id(module.weight) not in seen:
            seen[id(module.weight)] = None
            weights[f"{name}.weight".lstrip(".")] = module
    return weights


def _affine(key: str, module: FakeQuant) -> Grid:
    """The grid of a module, which must be an affine one."""
    grid = rounding_state(module).grid
    if not isinstance(grid, Grid):
        raise ExportError(
            f"'{key}' was quantized by {grid.quantizer!r}, whose values are not evenly spaced: ONNX's DequantizeLinear "
            "cannot hold them. Quantize with quantizer='affine', or use save_quantized."
        )
    return grid


@contextmanager
def _opened(modules: Mapping[str, FakeQuant]) -> Iterator[None]:
    """Let fake-quant modules use their weight as it is for a while, and mark where they round their inputs."""
    before = {name: rounding_state(module).quantizing for name, module in modules.items()}
    try:
        with ExitStack() as stack:
            for module in modules.values():
                state = rounding_state(module)
                state.quantizing = False
                if state.input_grid is not None:
                    assert isinstance(module, nn.Module)
                    handle = module.register_forward_pre_hook(_marking(state.input_grid), with_kwargs=True)
                    stack.callback(handle.remove)
            yield
    finally:
        for name, module in modules.items():
            rounding_state(module).quantizing = before[name]


def _marking(grid: InputGrid) -> Callable[..., Any]:
    """A hook that lets a node stand for the rounding of a module's input."""

    def mark(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        node, kind = f"{DOMAIN}::{ROUND_INPUT}", torch.float32  # grids are applied in float32, as in PyTorch
        return torch.onnx.ops.symbolic(node, (x.float(),), asdict(grid), dtype=kind, shape=x.shape, version=1).to(
            x.dtype
        )

    return lambda module, args, kwargs: change_first(mark, args, kwargs)


@contextmanager
def _inputs_kept(modules: Mapping[str, FakeQuant]) -> Iterator[None]:
    """Let fake-quant modules take their inputs as they are for a while."""
    grids = {name: rounding_state(module).input_grid for name, module in modules.items()}
    try:
        for module in modules.values():
            rounding_state(module).input_grid = None
        yield
    finally:
        for name, module in modules.items():
            rounding_state(module).input_grid = grids[name]


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _arguments(
    model: nn.Module, example: Tensor | Sequence[Tensor] | Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor], list[str]]:
    """Positional arguments, keyword arguments and the names of all of them."""
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args: list[Any] = [] if kwargs else [example] if isinstance(example, Tensor) else list(example)
    if not all(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
        raise ExportError("example_input must be a tensor, a tuple of tensors or a dict of tensors.")
    positional = [
        p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL
    ]
    names = [positional[i] if i < len(positional) else f"input_{i}" for i in range(len(args))]
    return args, kwargs, [*names, *kwargs]


def _output(model: nn.Module, args: list[Tensor], kwargs: dict[str, Tensor]) -> Any:
    try:
        return model(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ExportError(
            f"{type(model).__name__} cannot take example_input, {describe(kwargs or args)} ({type(error).__name__}: "
            f"{error}); it must be a tensor, a tuple of forward's arguments, or a dict of them by name."
        ) from error


def _output_names(output: Any, count: int) -> list[str]:
    if isinstance(output, Mapping) and len(output) == count:
        return [str(key) for key in output]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _traced(
    model: nn.Module,
    weights: Mapping[str, FakeQuant],
    args: list[Tensor],
    kwargs: dict[str, Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Any:
    """The graph, with the quantized weights as its first inputs."""
    vary = {0: torch.export.Dim.AUTO}
    shapes = {
        "weights": [{} for _ in weights],
        "args": [vary if x.ndim else {} for x in args],
        "kwargs": {name: vary if x.ndim else {} for name, x in kwargs.items()},
    }
    values = [module.weight.detach() for module in weights.values()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; what matters is checked afterwards
            program = torch.onnx.export(
                _Opened(model, list(weights)).eval(),
                kwargs={"weights": values, "args": args, "kwargs": kwargs},
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[*weights, *inputs],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {_reason(error)}") from error
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # traces of the exporting machine's source files
    return proto


def _reason(error: BaseException) -> str:
    """What the exporter stumbled over, in one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
    if operator:
        return f"ONNX has no counterpart for the operator {operator[1]}. Replace it, or leave it out of the network."
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


def _checked(
    proto: Any, inputs: Sequence[Tensor], expected: Sequence[Tensor], flips: Sequence[float]
) -> tuple[bytes, float]:
    """The bytes of a graph that gives the expected outputs in ONNX Runtime, and the largest difference."""
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    payload = proto.SerializeToString()
    try:
        onnx.checker.check_model(payload, full_check=True)
        session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        outputs = session.run(None, {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)})
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ExportError(
            f"ONNX Runtime cannot run the exported network: {str(error).strip().splitlines()[0]}"
        ) from error
    largest = 0.0
    for result, wanted, flip in zip(outputs, expected, flips, strict=True):
        want = wanted.detach().cpu().double()
        difference = _largest(torch.from_numpy(result).double() - want)
        allowed = _TOLERANCES.get(wanted.dtype, 0.0) * _largest(want) + flip
        if not difference <= allowed:
            raise ExportError(
                f"ONNX Runtime's outputs differ from PyTorch's by {difference:.3g}; rounding explains {allowed:.3g}. "
                "The network was not written."
            )
        largest = max(largest, difference)
    return payload, largest


def _notes(bits: Mapping[str, int], integers: Mapping[str, Integers]) -> tuple[str, ...]:
    """One line for every kind of widening, with the number of weights it befell."""
    kinds = Counter((bits[key], x.type, x.doubled) for key, x in integers.items() if x.type != f"uint{bits[key]}")
    why = "; codes are doubled, since zero points lie half-way between two"
    return tuple(
        f"{count} weight{'s' * (count > 1)} of {b} bits stored as {kind}{why * doubled}."
        for (b, kind, doubled), count in sorted(kinds.items())
    )
