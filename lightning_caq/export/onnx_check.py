"""The check of an export: ONNX Runtime against PyTorch, output by output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_caq.errors import ExportError

# Largest difference from PyTorch's outputs, relative to the largest of them: sums in another order, no more.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where inputs are rounded, a value half-way between two codes, up to such differences, may fall to either side, and
# others behind it with it. After some layers two runs differ as two independent roundings do: outputs may differ by
# this many times what the rounding of all inputs changes.
FLIPS = 1.5
# ONNX Runtime makes products with a DequantizeLinear node into ones whose inputs it rounds to 8 bits, unless told.
PRODUCTS = "session.qdq_matmulnbits_accuracy_level"


@dataclass(frozen=True)
class Reference:
    """What PyTorch gives.

    Attributes:
        inputs: The inputs by name.
        names: Names of the outputs.
        outputs: What the fake-quant network gives.
        flips: How far each output may be off for values that fall to another code; 0 where inputs are not rounded.
    """

    inputs: Mapping[str, Tensor]
    names: Sequence[str]
    outputs: Sequence[Tensor]
    flips: Sequence[float]


@dataclass(frozen=True)
class Check:
    """A graph that gives what is expected.

    Attributes:
        payload: Its bytes.
        differences: Largest difference by output, products taken in floating point.
        default_differences: The same with ONNX Runtime's defaults.
        notes: Where these differ by more than rounding explains.
    """

    payload: bytes
    differences: dict[str, float]
    default_differences: dict[str, float]
    notes: tuple[str, ...] = ()


def add_settings(proto: Any) -> None:
    """Write into a graph's metadata which option of a session keeps products in floating point.

    Args:
        proto: The ``onnx.ModelProto``, changed in place.
    """
    entry = proto.metadata_props.add()
    entry.key, entry.value = f"lightning_caq.{PRODUCTS}", "1"


def checked(proto: Any, references: Sequence[Reference]) -> Check:
    """Run a graph in ONNX Runtime and compare every output.

    Args:
        proto: The ``onnx.ModelProto``.
        references: Inputs and what is expected for them.

    Raises:
        ExportError: If ONNX Runtime cannot run the graph, or an output differs by more than rounding explains.
    """
    payload = proto.SerializeToString()
    try:
        import_module("onnx").checker.check_model(payload, full_check=True)
        exact = _run(payload, references, {PRODUCTS: "1"})
        default = _run(payload, references, {})
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ExportError(
            f"ONNX Runtime cannot run the exported network: {str(error).strip().splitlines()[0]}"
        ) from error
    differences: dict[str, float] = {}
    for name, result, expected, flip in _pairs(references, exact):
        differences[name] = max(_difference(name, result, expected, flip), differences.get(name, 0.0))
    apart, default_differences = 0.0, dict.fromkeys(differences, 0.0)
    for name, result, expected, flip in _pairs(references, default):
        difference = _largest_difference(result, expected)
        default_differences[name] = max(difference, default_differences[name])
        if difference > _allowed(expected, flip):
            apart = max(apart, difference)
    if not apart:
        return Check(payload, differences, default_differences)
    note = (
        f"With its defaults ONNX Runtime takes matrix products of 4 and 8 bits with inputs rounded to 8 bits, which "
        f"moves outputs by up to {apart:.2g}; the session option {PRODUCTS}='1' keeps inputs as they are."
    )
    return Check(payload, differences, default_differences, (note,))


def _run(payload: bytes, references: Sequence[Reference], settings: Mapping[str, str]) -> list[list[Any]]:
    """What ONNX Runtime gives for each of the references."""
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    wanted = [x.name for x in session.get_inputs()]
    feeds = ({name: reference.inputs[name].detach().cpu().numpy() for name in wanted} for reference in references)
    return [session.run(None, feed) for feed in feeds]


def _pairs(
    references: Sequence[Reference], found: Sequence[Sequence[Any]]
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, result, expected values and flips of every output."""
    for reference, results in zip(references, found, strict=True):
        tensors = map(torch.from_numpy, results)
        yield from zip(reference.names, tensors, reference.outputs, reference.flips, strict=True)


def _difference(name: str, result: Tensor, expected: Tensor, flip: float) -> float:
    if result.shape != expected.shape:
        raise ExportError(
            f"ONNX Runtime's {name} has shape {list(result.shape)}, PyTorch's {list(expected.shape)}. "
            "The network was not written."
        )
    difference, allowed = _largest_difference(result, expected), _allowed(expected, flip)
    if not difference <= allowed:
        raise ExportError(
            f"ONNX Runtime's {name} differs from PyTorch's by {difference:.3g}; rounding explains {allowed:.3g}. "
            "The network was not written."
        )
    return difference


def _largest_difference(result: Tensor, expected: Tensor) -> float:
    return largest(result.double() - expected.detach().cpu().double())


def _allowed(expected: Tensor, flip: float) -> float:
    return TOLERANCES.get(expected.dtype, 0.0) * largest(expected.double()) + flip


def largest(values: Tensor) -> float:
    """The largest absolute value; 0 if there is none.

    Example:
        >>> largest(torch.tensor([-2.0, 1.0])), largest(torch.empty(0))
        (2.0, 0.0)
    """
    return float(values.detach().abs().max()) if values.numel() else 0.0
