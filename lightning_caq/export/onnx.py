"""ONNX: a quantized network as a graph that stock runtimes run, its weights stored as integers.

The network is traced with its quantized weights as inputs, so that nothing the exporter does, such as folding or
transposing constants, can touch them. Each such input is then replaced by integers and a DequantizeLinear node. Where
the input of a layer is rounded, a node of our own stands in the trace; QuantizeLinear and DequantizeLinear take its
place.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_caq.errors import ExportError
from lightning_caq.export.integer_check import checked_integers
from lightning_caq.export.integer_export import check_input_grids, to_integer_graph
from lightning_caq.export.integers import TYPES, Integers, to_integers
from lightning_caq.export.onnx_axes import candidate_axes, fix_single_values, free_axes, several_samples, traced_shapes
from lightning_caq.export.onnx_check import FLIPS, Reference, add_settings, checked, largest
from lightning_caq.export.onnx_graph import DOMAIN, ROUND_INPUT, dequantize_input, name_dimensions, quantize_rounded
from lightning_caq.export.onnx_inputs import DynamicShapes, ExampleInputs, check_shapes, read_example
from lightning_caq.export.packed_modules import check_quantized
from lightning_caq.network.parts.expand import split_weights
from lightning_caq.quantizers.fake_quant.modules import FakeQuant, quantized_weight
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.activations import InputGrid, change_first
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.structures import describe

OPSET = 21  # the first with 4-bit and 16-bit types
_OPSETS = range(18, 24)  # what torch's exporter writes and onnxruntime reads
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote.

    Attributes:
        path: The file.
        types: Integer type of every quantized weight by state-dict key, such as ``{"conv1.weight": "uint4"}``.
        notes: What was stored wider than its bit-width, and why; which sizes could not be checked; where ONNX
            Runtime's defaults compute otherwise.
        differences: Largest difference between ONNX Runtime's and PyTorch's values by output, products taken in
            floating point.
        default_differences: The same in a session with ONNX Runtime's default options.
    """

    path: Path
    types: dict[str, str]
    notes: tuple[str, ...]
    differences: dict[str, float]
    default_differences: dict[str, float]

    @property
    def difference(self) -> float:
        """The largest difference of all outputs, products taken in floating point."""
        return max(self.differences.values(), default=0.0)

    @property
    def default_difference(self) -> float:
        """The largest difference of all outputs in a session with ONNX Runtime's default options."""
        return max(self.default_differences.values(), default=0.0)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    opset: int = OPSET,
    integers: Literal["weights", "all"] = "weights",
    fused: bool = False,
) -> OnnxExport:
    """Write a quantized network as ONNX with integer weights, and check every output in ONNX Runtime.

    Weights are uint4 or uint8 with one scale and zero point a channel, or a block (DequantizeLinear); other bit-widths
    are stored in the next larger type that holds them. Dequantized weights equal PyTorch's to the last bit. Inputs that
    are rounded pass through QuantizeLinear and DequantizeLinear in uint8, after a Clip if their grid has fewer codes.
    The network is exported in eval mode, and without caches (``config.use_cache``).

    Args:
        model: The quantized network; left as it was.
        path: The file, such as ``net.onnx``.
        example_input: An input: a tensor, a tuple of positional arguments, or a dict: of keyword arguments of
            ``forward``, or its one argument. Arguments may be tuples and dicts of tensors. Outputs are compared on it.
        dynamic_shapes: Which dimensions may vary: input to dimension to a name, such as ``{"x": {0: "batch", 1:
            "length"}}``; those of one name vary together. Inputs go by the parameters of ``forward`` and by the keys of
            dicts. By default the first dimension of every input varies where the network allows it, and of inputs in a
            dict the second one too. Outputs are compared at twice the size as well.
        opset: Version of ONNX's operators, 18 to 23. Before 21 there are no types of 4 and 16 bits: weights are uint8.
        fused: Let ONNX Runtime make one operator (MatMulNBits) of a weight of 4 or 8 bits and its matrix product, which
            is faster and takes less memory. It then rounds inputs of products to 8 bits, unless a session is made with
            ``session.qdq_matmulnbits_accuracy_level`` set to ``"1"``; the file's metadata say so. By default weights
            are written such that products are taken in floating point in any session.
        integers: ``"weights"`` stores weights as integers and computes in floating point. ``"all"`` computes in
            integers, in the pattern that ONNX Runtime turns into its integer kernels; inputs of layers have to be
            rounded to 8 bits (``activation_bits=8``), and weights fit into a signed byte (``runtime="onnxruntime"``).
            What else is rounded, such as the sums of residual blocks, takes its ranges from ``example_input``: give it
            some dozens of samples.

    Returns:
        The path, the types, notes on what was widened, and the differences.

    Raises:
        LayerError: If the network is not quantized.
        ExportError: If packages of the extra ``onnx`` are missing, the network cannot take the example or holds an
            operator that ONNX or ONNX Runtime lacks, a dimension cannot vary, or the outputs differ by more than
            rounding; no file is then written.

    Example:
        >>> import pytest, tempfile
        >>> _ = [pytest.importorskip(name) for name in ("onnx", "onnxruntime", "onnxscript")]
        >>> from lightning_caq import quantize
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = quantize(net, [torch.randn(64, 8)], avg_bits=8, rounding="nearest")
        >>> export_onnx(net, f"{tempfile.mkdtemp()}/net.onnx", torch.randn(2, 8)).difference < 1e-5
        True
    """
    check_quantized(model)
    with split_weights(model):
        return _exported(
            model, path, example_input, dynamic_shapes=dynamic_shapes, opset=opset, fused=fused, integers=integers
        )


def _exported(
    model: nn.Module,
    path: str | Path,
    example_input: Any,
    *,
    dynamic_shapes: DynamicShapes | None,
    opset: int,
    fused: bool,
    integers: str,
) -> OnnxExport:
    """What ``export_onnx`` does, once every weight is a parameter of a layer."""
    modules = check_quantized(model)
    check_packages("export_onnx")
    if any(rounding_state(module).input_grid is not None for module in modules.values()) and not hasattr(
        torch.onnx, "ops"
    ):
        raise ExportError("Rounded activations are exported by torch 2.8 and later; install a newer torch.")
    if opset not in _OPSETS:
        raise ExportError(f"opset={opset!r} is not allowed; give a number from {_OPSETS[0]} to {_OPSETS[-1]}.")
    if integers not in ("weights", "all"):
        raise ExportError(f"integers={integers!r} is not known; give 'weights' or 'all'.")
    if fused and integers == "all":
        raise ExportError("fused=True is for integers='weights'; leave it out with integers='all'.")
    example = read_example(model, example_input)
    check_shapes(example, dynamic_shapes)
    weights = _weights(model, modules)
    types = ("uint8",) if opset < OPSET else tuple(TYPES)
    stored = {k: to_integers(quantized_weight(module), _affine(k, module), types) for k, module in weights.items()}
    with preserved(model), torch.no_grad(), _without_caches(model):
        references = [_reference(model, modules, example)]
        with _opened(modules):
            proto = _traced(model, weights, example, references[0].names, dynamic_shapes, opset)
        varying = free_axes(proto.graph, example) if dynamic_shapes is None else dynamic_shapes
        name_dimensions(proto.graph, varying)
        notes = []
        if varying:
            try:
                references.append(_reference(model, modules, example.enlarged(varying)))
            except ExportError:
                notes.append("The network cannot take inputs twice as large: only the size of the example was checked.")
    if integers == "all":
        check_input_grids(proto)
    plain = type(proto)()
    plain.CopyFrom(proto)
    _store(plain, stored, fused=fused)
    if fused:
        add_settings(plain)
    check, kinds = checked(plain, references), {key: x.type for key, x in stored.items()}
    kept = stored
    if integers == "all":
        graph = to_integer_graph(proto, stored, plain, example.named)
        kept = {key: x for key, x in stored.items() if key in graph.left}
        _store(proto, kept, fused=False)
        check, kinds = checked_integers(proto, references, graph.layers), kinds | graph.types
        notes += graph.notes
    widened = _notes({key: rounding_state(weights[key]).bits for key in kept}, kept)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(check.payload)
    return OnnxExport(
        path=path,
        types=kinds,
        notes=(*widened, *notes, *check.notes),
        differences=check.differences,
        default_differences=check.default_differences,
    )


def float_graph(model: nn.Module, example: ExampleInputs) -> Any:
    """A network as an ONNX graph in floating point, its weights and inputs of layers not rounded.

    Args:
        model: The network, quantized or not; left as it was.
        example: What it is called with.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        ExportError: If it cannot take the example, or holds an operator that ONNX lacks.
    """
    modules = quantized_modules(model)
    with preserved(model), torch.no_grad(), _inputs_kept(modules), _opened(modules):
        model.eval()
        outputs = [x for x in tree_leaves(_output(model, example)) if isinstance(x, Tensor)]
        return _traced(model, {}, example, _output_names(None, len(outputs)), None, OPSET)


def _store(proto: Any, weights: Mapping[str, Integers], *, fused: bool) -> None:
    """Put weights and roundings of inputs into a graph."""
    for key, stored in weights.items():
        dequantize_input(proto.graph, key, stored, fused=fused)
    quantize_rounded(proto)


def check_packages(function: str) -> None:
    """Refuse to go on without the packages of the extra ``onnx``.

    Raises:
        ExportError: If one is missing.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ExportError(f"{function} needs {', '.join(missing)}; run pip install 'lightning-caq[onnx]'.")


class _Opened(nn.Module):
    """A network whose quantized weights are inputs."""

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model, self.keys = model, tuple(keys)

    def forward(self, weights: list[Tensor], args: list[Any], kwargs: dict[str, Any]) -> Any:
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


def _affine(key: str, module: FakeQuant) -> Grid | SteppedGrid:
    """The grid of a module, whose values must be evenly spaced."""
    grid = rounding_state(module).grid
    if not isinstance(grid, (Grid, SteppedGrid)):
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


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Let networks that cache keys and values (transformers' ``config.use_cache``) return none for a while."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


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


def _reference(model: nn.Module, modules: Mapping[str, FakeQuant], inputs: ExampleInputs) -> Reference:
    """What the fake-quant network gives, and how far off a value may be that falls to another code."""
    output = _output(model, inputs)
    outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    with _inputs_kept(modules):
        kept = [x for x in tree_leaves(_output(model, inputs)) if isinstance(x, Tensor)]
    flips = [FLIPS * largest(a.double() - b.double()) for a, b in zip(outputs, kept, strict=True)]
    names = _output_names(output, len(outputs))
    return Reference(inputs=inputs.named, names=names, outputs=outputs, flips=flips)


def _output(model: nn.Module, inputs: ExampleInputs) -> Any:
    try:
        return model(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ExportError(
            f"{type(model).__name__} cannot take example_input, {describe(inputs.example)} "
            f"({type(error).__name__}: {error}); it must be a tensor, a tuple of forward's arguments, or a dict of "
            "them by name."
        ) from error


def _output_names(output: Any, count: int) -> list[str]:
    if isinstance(output, Mapping) and len(output) == count:
        return [str(key) for key in output]
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _traced(
    model: nn.Module,
    weights: Mapping[str, FakeQuant],
    example: ExampleInputs,
    outputs: Sequence[str],
    dynamic: DynamicShapes | None,
    opset: int,
) -> Any:
    """The graph, with the quantized weights as its first inputs."""
    values = [module.weight.detach() for module in weights.values()]
    if dynamic is None:
        example = several_samples(example)

    def export(free: Sequence[int]) -> Any:
        shapes = {"weights": [{} for _ in weights], **traced_shapes(example, dynamic, free)}
        return torch.onnx.export(
            _Opened(model, list(weights)).eval(),
            kwargs={"weights": values, "args": list(example.args), "kwargs": example.kwargs},
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=[*weights, *example.named],
            output_names=list(outputs),
            verbose=False,
        )

    free = candidate_axes(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations; what matters is checked afterwards
        try:
            try:
                program = export(free)
            except torch.onnx.OnnxExporterError:
                if len(free) == 1 or dynamic is not None:
                    raise
                program = export(free[:1])  # a network that knows one length only
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {_reason(error)}") from error
    assert program is not None
    proto = program.model_proto
    fix_single_values(proto.graph, program.exported_program)
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


def _notes(bits: Mapping[str, int | float], integers: Mapping[str, Integers]) -> tuple[str, ...]:
    """One line for every kind of widening, with the number of weights it befell."""
    kinds = Counter((bits[key], x.type, x.doubled) for key, x in integers.items() if x.type != f"uint{bits[key]}")
    why = "; codes are doubled, since zero points lie half-way between two"
    return tuple(
        f"{count} weight{'s' * (count > 1)} of {b:.3g} bits stored as {kind}{why * doubled}."
        for (b, kind, doubled), count in sorted(kinds.items())
    )
