"""The check of a network in integers: ONNX Runtime's integer kernels against the same graph node by node."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_caq.errors import ExportError
from lightning_caq.export.integer_layers import LAYERS
from lightning_caq.export.onnx_check import TOLERANCES, Check, Reference, largest


def checked_integers(proto: Any, references: Sequence[Reference], layers: frozenset[str]) -> Check:
    """Run a graph in ONNX Runtime as it is executed, and node by node, and compare every output.

    Kernels round products to the next code in another way than the nodes do that they stand for, so a value half-way
    between two codes may fall to either; outputs may differ by as much as the rounding of all inputs changes.

    Args:
        proto: The ``onnx.ModelProto``.
        references: Inputs, and what PyTorch gives for them.
        layers: Names of the nodes that are integer layers.

    Returns:
        The graph, the largest differences from PyTorch, which does not round sums and the like, and notes.

    Raises:
        ExportError: If ONNX Runtime cannot run the graph, or its kernels compute something else than the nodes.
    """
    payload = proto.SerializeToString()
    differences: dict[str, float] = {}
    sizes: dict[str, float] = {}
    try:
        import_module("onnx").checker.check_model(payload, full_check=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "optimized.onnx"
            fused = _session(payload, optimized=file)
            unfused = _left_in_float(file, layers)
        plain = _session(payload)
        results = [[_run(session, x) for session in (fused, plain)] for x in references]
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ExportError(
            f"ONNX Runtime cannot run the exported network: {str(error).strip().splitlines()[0]}"
        ) from error
    for reference, (values, nodes) in zip(references, results, strict=True):
        for name, value, node, expected, flip in zip(
            reference.names, values, nodes, reference.outputs, reference.flips, strict=True
        ):
            apart = largest(value.double() - node.double())
            allowed = TOLERANCES.get(expected.dtype, 0.0) * largest(expected.double()) + flip
            if value.shape != expected.shape or not apart <= allowed:
                raise ExportError(
                    f"ONNX Runtime's integer kernels give {name} of shape {list(value.shape)} that is {apart:.3g} off "
                    f"what the nodes say; rounding explains {allowed:.3g}. The network was not written."
                )
            difference = largest(value.double() - expected.detach().cpu().double())
            differences[name] = max(difference, differences.get(name, 0.0))
            sizes[name] = max(largest(expected), sizes.get(name, 0.0))
    return Check(payload, differences, differences, (*_accuracy(differences, sizes), *_unfused(unfused)))


def _accuracy(differences: dict[str, float], sizes: dict[str, float]) -> list[str]:
    """How far outputs are from those of the network that was judged."""
    moved = ", ".join(f"{name} by up to {x:.2g} of {sizes[name]:.2g}" for name, x in differences.items())
    return [f"Sums, averages and outputs of convolutions are rounded to 8 bits too, which moves {moved}."]


def _unfused(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"ONNX Runtime computes {listed} in floating point, though the graph has integers there."]


def _session(payload: bytes, *, optimized: Path | None = None) -> Any:
    """A session, of the graph node by node, or as it is optimized, which is also written to a file."""
    onnxruntime = import_module("onnxruntime")
    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])


def _run(session: Any, reference: Reference) -> list[torch.Tensor]:
    wanted = [x.name for x in session.get_inputs()]
    feed = {name: reference.inputs[name].detach().cpu().numpy() for name in wanted}
    return [torch.from_numpy(x) for x in session.run(None, feed)]


def _left_in_float(file: Path, layers: frozenset[str]) -> list[str]:
    """The integer layers that an optimized graph computes in floating point."""
    nodes = import_module("onnx").load(file).graph.node
    return [node.name for node in nodes if node.name in layers and node.op_type in (*LAYERS, "FusedConv")]
