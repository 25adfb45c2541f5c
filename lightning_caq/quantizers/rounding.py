"""Rounding: which value of the grid each weight takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.layers import Layer, layer_modules, layer_weight
from lightning_caq.matrix import column_chunks, from_matrix, to_matrix
from lightning_caq.quantizers.affine import Grid
from lightning_caq.visits import visit_modules

_DAMPING = 0.01
_BLOCK = 64


def input_curvature(model: nn.Module, layer: Layer, batches: Iterable[Any]) -> Tensor | None:
    """Second moment of the columns a layer multiplies, E[z zᵀ]: the curvature it sees from its own inputs.

    It is the Gauss–Newton block of the squared output error, up to the output's own curvature (theory: rounding and
    repair).

    Args:
        model: The network, in eval mode.
        layer: The layer.
        batches: Calibration batches.

    Returns:
        Shape (groups, columns, columns), float32, mean over samples and positions; ``None`` for an embedding, whose
        curvature is diagonal, and for a layer that no batch reaches.
    """
    if layer.kind == "embedding" or not layer.calls:
        return None
    total: Tensor | None = None
    count = 0

    def visit(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        nonlocal total, count
        for chunk in column_chunks(layer, module, inputs):
            flat = chunk.float().movedim(0, 2).flatten(2)  # (groups, columns, samples · positions)
            moment = flat @ flat.transpose(1, 2)
            total = moment if total is None else total.add_(moment)
            count += flat.shape[-1]

    visit_modules(model, layer_modules(model, layer), batches, visit, calls=layer.calls)
    return None if total is None else total / count


def round_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Codes of the nearest values, uint8 in the shape of the weight."""
    return grid.codes(weight).to(torch.uint8)


def round_error_feedback(layer: Layer, weight: Tensor, grid: Grid, curvature: Tensor | None) -> Tensor:
    """Round one input column at a time; columns not yet rounded absorb the error.

    Column j is rounded to q_j; the error e = (w_j − q_j) / (H⁻¹)_jj is then taken from the columns that are left,
    w_k −= e · (H⁻¹)_jk, where H⁻¹ belongs to the columns that are left. That minimises the squared output error
    given the roundings already made (Optimal Brain Quantization, Frantar & Alistarh 2022). All H⁻¹ come from one
    Cholesky factor (GPTQ, Frantar et al. 2023). Columns with the most curvature go first.

    Args:
        layer: The layer.
        weight: Its weight.
        grid: The values its weights may take.
        curvature: E[z zᵀ], shape (groups, columns, columns); ``None`` rounds to the nearest values, which is exact
            where columns do not interact.

    Returns:
        Codes, uint8 in the shape of the weight.

    Example:
        >>> layer = Layer("fc", "linear", (1, 2))
        >>> grid = Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
        >>> w, z = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 1.0]])  # both inputs always equal
        >>> round_nearest(w, grid), round_error_feedback(layer, w, grid, (z.T @ z)[None])
        (tensor([[0, 0]], dtype=torch.uint8), tensor([[0, 1]], dtype=torch.uint8))
    """
    if curvature is None:
        return round_nearest(weight, grid)
    matrices = (
        to_matrix(layer, weight.detach().float()),
        to_matrix(layer, grid.scale.expand(layer.shape)),
        to_matrix(layer, grid.zero_point.expand(layer.shape)),
    )
    groups = zip(*matrices, curvature.to(weight.device), strict=True)
    codes = torch.stack([_feedback(w, s, z, 2**grid.bits - 1, h) for w, s, z, h in groups])
    return from_matrix(layer, codes.to(torch.uint8)).contiguous()


def _feedback(matrix: Tensor, scale: Tensor, zero: Tensor, top: int, curvature: Tensor) -> Tensor:
    """Codes of one group; matrix, scale and zero have shape (outputs, columns)."""
    order = curvature.diagonal().argsort(descending=True, stable=True)
    # Columns become rows: what the loop touches then lies together in memory.
    w, s, z = (x[:, order].T.contiguous() for x in (matrix, scale, zero))
    factor = _inverse_factor(curvature[order][:, order])
    codes = torch.empty_like(w)
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            code = (w[j] / s[j] + z[j]).round_().clamp_(0, top)
            error = (w[j] - s[j] * (code - z[j])) / factor[j, j]
            w[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
            codes[j], errors[j - start] = code, error
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes[order.argsort()].T


def _inverse_factor(curvature: Tensor) -> Tensor:
    """Upper factor U of the damped inverse, H⁻¹ = UᵀU; its rows are the inverses' rows the feedback needs, scaled."""
    h = curvature.double()
    mean = h.diagonal().mean()
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (_DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def round_layer(model: nn.Module, layer: Layer, grid: Grid, rounding: str, batches: Iterable[Any]) -> Tensor:
    """Codes of one layer.

    Args:
        model: The network; the inputs that reach the layer in it are the ones ``"error_feedback"`` rounds for.
        layer: The layer.
        grid: Its grid.
        rounding: ``"nearest"`` or ``"error_feedback"``.
        batches: Calibration batches.

    Returns:
        Codes, uint8 in the shape of the weight.
    """
    weight = layer_weight(model, layer)
    curvature = input_curvature(model, layer, batches) if rounding == "error_feedback" else None
    return round_error_feedback(layer, weight, grid, curvature)
