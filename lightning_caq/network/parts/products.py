"""Products of one operator: layers with inputs before outputs, bilinear maps, and tables whose rows are summed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.parts.kind import Kind, arguments, of_class
from lightning_caq.network.parts.part import View

LINEAR, TABLE = "linear", "table"


def _route_conv1d(module: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is not torch.addmm or args[2] is not module.weight:
        return NotImplemented
    return module.linear(args[1]) + args[0]


def _route_bilinear(module: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is not F.bilinear:
        return NotImplemented
    first, second, _, bias = args
    products: Tensor = module.linear((first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2))
    return products if bias is None else products + bias


def _route_bag(module: nn.EmbeddingBag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if func is not F.embedding_bag else _bag(module, **arguments(func, args, kwargs))


def _bag(
    module: Any,
    *,
    input: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    **of_weights: Any,
) -> Tensor:
    """``F.embedding_bag``, whose arguments these are; those of the weight are left to the part."""
    rows, words = module.table(input), input
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if input.ndim == 2:
        return _reduced(rows, words, mode, padding_idx)
    assert offsets is not None
    ends = offsets[1:].tolist() if include_last_offset else [*offsets[1:].tolist(), len(input)]
    bags = zip(offsets.tolist(), ends, strict=False)
    return torch.stack([_reduced(rows[a:b][None], words[a:b][None], mode, padding_idx)[0] for a, b in bags])


def _reduced(rows: Tensor, words: Tensor, mode: str, padding: int | None) -> Tensor:
    """Bags of rows, shape (bags, rows, width), as one row each; empty ones are zero."""
    counts = torch.ones_like(words, dtype=rows.dtype) if padding is None else (words != padding).to(rows)
    number = counts.sum(1, keepdim=True)
    if mode == "max":
        masked = rows.masked_fill(counts[..., None] == 0, -torch.inf)
        largest = masked.amax(1) if rows.shape[1] else rows.new_zeros(len(rows), rows.shape[2])
        return torch.where(number > 0, largest, 0.0)
    total = (rows * counts[..., None]).sum(1)
    return total if mode == "sum" else total / number.clamp_min(1)


CONV1D = Kind(
    name="conv1d",
    covers=lambda module: of_class(module, "Conv1D", "transformers"),
    views=lambda module: {LINEAR: View("weight", transposed=True)},
    route=_route_conv1d,
)
BILINEAR = Kind(
    name="bilinear",
    covers=lambda module: isinstance(module, nn.Bilinear),
    views=lambda module: {LINEAR: View("weight", flat=True)},
    route=_route_bilinear,
)
BAG = Kind(
    name="embedding bag",
    covers=lambda module: isinstance(module, nn.EmbeddingBag) and module.max_norm is None,
    views=lambda module: {TABLE: View("weight", table=True)},
    route=_route_bag,
)
