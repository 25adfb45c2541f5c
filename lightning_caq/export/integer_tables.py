"""Integer tables: embeddings whose rows are looked up as codes, so that only the rows in use become numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_caq.export.integer_layers import signed_codes
from lightning_caq.export.integer_view import attribute
from lightning_caq.export.integers import Integers


@dataclass(frozen=True, eq=False)
class IntegerTable:
    """A table whose row r is scale_r · codes_r.

    Attributes:
        key: State-dict key of the table.
        codes: Whole numbers from −128 to 127, shape (rows, columns), int32.
        scale: One a row, float32.
    """

    key: str
    codes: np.ndarray
    scale: np.ndarray


def find_integer_tables(graph: Any, weights: Mapping[str, Integers]) -> dict[str, IntegerTable]:
    """The tables of a graph that can be looked up as codes, by name of the node.

    Args:
        graph: The ``onnx.GraphProto``, the weights among its inputs.
        weights: Those, by name.
    """
    tables = {}
    for node in graph.node:
        stored = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if stored is None or attribute(node, "axis", 0) != 0 or stored.values.ndim != 2 or stored.scale.ndim > 1:
            continue
        codes = signed_codes(stored)
        by_row = stored.axis == 0 or stored.scale.numel() == 1
        if by_row and codes.min(initial=0) >= -128 and codes.max(initial=0) <= 127:
            scale = np.broadcast_to(stored.scale.cpu().float().numpy().reshape(-1), len(codes)).copy()
            tables[node.name] = IntegerTable(node.input[0], codes, scale)
    return tables
