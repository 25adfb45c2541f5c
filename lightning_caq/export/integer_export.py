"""Networks in integers: from the traced graph of a quantized network to one that runtimes execute in integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_caq.errors import ExportError
from lightning_caq.export.integer_layers import find_integer_layers, folded_graph
from lightning_caq.export.integer_nodes import write_integer_nodes
from lightning_caq.export.integer_ranges import observed_grids
from lightning_caq.export.integer_scheme import Scheme, grid_of, make_scheme
from lightning_caq.export.integer_tables import find_integer_tables
from lightning_caq.export.integer_view import replace_nodes
from lightning_caq.export.integers import Integers
from lightning_caq.export.onnx_graph import ROUND_INPUT


@dataclass(frozen=True)
class IntegerGraph:
    """A graph that computes in integers.

    Attributes:
        types: Integer type of every weight of an integer layer, by its key.
        left: Keys of the weights that are still among the inputs of the graph.
        layers: Names of the nodes that are integer layers.
        notes: What is not computed in integers, and what was rounded again.
    """

    types: dict[str, str]
    left: frozenset[str]
    layers: frozenset[str]
    notes: tuple[str, ...]


def check_input_grids(proto: Any) -> None:
    """Refuse a traced network whose layers' inputs are not rounded to 8 bits.

    Raises:
        ExportError: If none is, or one is rounded to fewer.
    """
    grids = [grid_of(node) for node in proto.graph.node if node.op_type == ROUND_INPUT]
    if not grids or min(grid.bits for grid in grids) < 8:
        given = f"rounded to {min(grid.bits for grid in grids)} bits" if grids else "floating-point numbers"
        raise ExportError(
            f"integers='all' needs inputs of layers that are rounded to 8 bits; here they are {given}. Quantize with "
            "activation_bits=8, or export with integers='weights'."
        )


def to_integer_graph(
    proto: Any, weights: Mapping[str, Integers], observed: Any, inputs: Mapping[str, Tensor]
) -> IntegerGraph:
    """Turn a traced network into one that computes in integers.

    Args:
        proto: The traced ``onnx.ModelProto``, its weights among its inputs, and inputs of layers marked; changed in
            place. Weights of layers that stay in floating point are left among the inputs.
        weights: Its weights, by name.
        observed: The same network with weights and roundings in it, to observe ranges in.
        inputs: What to observe it on, by name.
    """
    graph, opset = proto.graph, next(x.version for x in proto.opset_import if x.domain in ("", "ai.onnx"))
    layers, reasons, absorbed = find_integer_layers(graph, weights)
    replace_nodes(graph, folded_graph(graph, layers, absorbed))
    scheme = make_scheme(graph, layers)
    grids = observed_grids(observed, list(scheme.open.values()), inputs)
    scheme = replace(scheme, grids=scheme.grids | {name: grids[seen] for name, seen in scheme.open.items()}, open={})
    types = write_integer_nodes(graph, scheme, find_integer_tables(graph, weights), opset)
    taken = {name for node in graph.node for name in node.input}
    left = [x for x in graph.input if x.name not in weights or x.name in taken]
    del graph.input[:]
    graph.input.extend(left)
    return IntegerGraph(types, frozenset(taken & weights.keys()), frozenset(scheme.layers), _notes(scheme, reasons))


def _notes(scheme: Scheme, reasons: Mapping[str, str]) -> tuple[str, ...]:
    """One line for every reason, with the nodes it holds for."""
    broken: dict[str, list[str]] = {}
    for name, reason in {**reasons, **scheme.breaks}.items():
        broken.setdefault(reason, []).append(name)
    notes = [f"Not in integers: {_listed(names)} ({reason})." for reason, names in broken.items()]
    moved = Counter({layer.key: layer.moved for layer in scheme.layers.values() if layer.moved})
    if moved:
        notes.append(
            f"{moved.total()} channels were rounded again, for their batch normalization turns their sign or outweighs "
            f"them: in {_listed(list(moved))}."
        )
    return tuple(notes)


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
