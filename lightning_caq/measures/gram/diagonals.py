"""Gauss–Newton diagonals: what the squares of gradient rows add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.gram.output_rows import choose_rows
from lightning_caq.measures.gram.pieces import passes
from lightning_caq.measures.gram.weight_rows import weight_rows
from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer, layer_weight

_LEAST_ROWS = 64


def gauss_newton_diagonals(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    *,
    tolerance: float = 1e-4,
    max_rows: int = 2048,
    memory: int = 2**30,
    seed: int = 0,
) -> tuple[dict[str, Tensor], float]:
    """Diagonal of the Gauss–Newton matrix of ``distill``, which is its Hessian H = AᵀA; nat/weight².

    Σ over the rows of A of their squares (``gram`` says what the rows are), so exact but for rows that were dropped,
    which can only lower it, and unbiased where rows were drawn (``choose_rows``). Costs one gradient a row, as the Gram
    spectrum does.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        tolerance: Share of the output Hessian's trace that may be dropped with the lightest rows.
        max_rows: Most rows; of more, so many are drawn.
        memory: Bytes that rows may take at a time.
        seed: Seed of the draw of rows.

    Returns:
        Layer name to diagonal, in the shape of the weight; the share of the output Hessian's trace in the rows that it
        was taken from.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> gauss_newton_diagonals(net, [Layer("", "linear", (1, 2), calls=1, modules=("",))], [x])
        ({'': tensor([[0.5000, 2.0000]])}, 1.0)
    """
    choice = choose_rows(model, batches, tolerance, max_rows, seed=seed)
    rows = choice.rows
    # Squares add up row by row: fewer rows at a time let more layers share a pass.
    step = min(max(memory // (4 * sum(layer.weights for layer in layers)), _LEAST_ROWS), len(rows))
    sums = {x.name: to_matrix(x, torch.zeros_like(layer_weight(model, x), requires_grad=False)) for x in layers}
    for pieces in passes(model, layers, batches, step, memory):
        for start in range(0, len(rows), step):
            for piece, piece_rows in weight_rows(model, pieces, batches, rows[start : start + step]).items():
                part = sums[piece.layer.name][:, piece.cut]
                part += piece_rows.squares().reshape(part.shape).to(part)
    return {layer.name: from_matrix(layer, sums[layer.name]) for layer in layers}, choice.kept
