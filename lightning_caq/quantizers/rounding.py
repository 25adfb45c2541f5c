"""Rounding: which value of the grid each weight takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.layers import Layer, layer_weight
from lightning_caq.matrix import from_matrix, to_matrix
from lightning_caq.quantizers.affine import Grid, fit_grid
from lightning_caq.quantizers.descent import improve
from lightning_caq.quantizers.moments import InputMoments, damped, input_moments

_BLOCK = 64


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
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(curvature)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def corrected_weight(layer: Layer, weight: Tensor, moments: InputMoments) -> Tensor:
    """The weight that makes up for the drift of its own inputs, before it is rounded.

    W' minimises E‖W z_f − W' z‖² + damping ‖W' − W‖², where z_f and z are the inputs in the float network and in the
    network rounded so far: W' = W + W E[(z_f − z) zᵀ] (E[z zᵀ] + damping)⁻¹. Rounding W' instead of W aims at the float
    network's outputs (asymmetric calibration: GPTAQ, Li et al. 2025).

    Args:
        layer: The layer.
        weight: Its weight.
        moments: Moments of its inputs.

    Returns:
        W', in the shape and type of the weight.

    Example:
        >>> layer, w = Layer("fc", "linear", (1, 1)), torch.tensor([[1.0]])  # its input came to be half of what it was
        >>> corrected_weight(layer, w, InputMoments(torch.ones(1, 1, 1), torch.ones(1, 1, 1)))
        tensor([[1.9901]])
    """
    matrix = to_matrix(layer, weight.detach().double())
    pull = torch.linalg.solve(damped(moments.curvature), matrix @ moments.drift.double(), left=False)
    return from_matrix(layer, matrix + pull).to(weight.dtype)


def round_layer(
    model: nn.Module,
    layer: Layer,
    bits: int,
    rounding: str,
    batches: Sequence[Any],
    floats: Mapping[str, Tensor],
) -> tuple[Grid, Tensor]:
    """Grid and codes of one layer; the network is left as it is.

    With ``"error_feedback"`` the layer is rounded for the inputs that reach it in the network as it is, such that its
    outputs come near those of the float network: the weight is corrected for the drift of its inputs, rounded with
    error feedback, and its codes and scales are improved by descent.

    Args:
        model: The network, the layers before this one rounded.
        layer: The layer.
        bits: Its bit-width.
        rounding: ``"nearest"`` or ``"error_feedback"``.
        batches: Calibration batches.
        floats: The float network's tensors by state-dict key; those that were not changed may be left out.

    Returns:
        The grid, and codes, uint8 in the shape of the weight.
    """
    weight = layer_weight(model, layer).detach()
    moments = input_moments(model, layer, batches, floats) if rounding == "error_feedback" else None
    if moments is None:
        grid = fit_grid(weight, bits, layer.channel_shape)
        return grid, round_nearest(weight, grid)
    target = corrected_weight(layer, weight, moments)
    grid = fit_grid(target, bits, layer.channel_shape)
    codes = round_error_feedback(layer, target, grid, moments.curvature)
    return improve(layer, target, grid, codes, moments.curvature)
