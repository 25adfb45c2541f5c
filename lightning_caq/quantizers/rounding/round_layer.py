"""Rounding: which value of the grid each weight takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.codebook import Codebook, nearest_codes
from lightning_caq.quantizers.grids.values import AFFINE, Quantizer, Values
from lightning_caq.quantizers.grids.zeros import kept_zeros, with_zero
from lightning_caq.quantizers.rounding.descent import improve
from lightning_caq.quantizers.rounding.moments import InputMoments, damped, input_moments
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.sizes import Width

_BLOCK = 64
# Drift is known from a few hundred samples; a correction that follows it to the last goes too far on others.
_CORRECTION_DAMPING = 0.1


def round_nearest(weight: Tensor, grid: Values) -> Tensor:
    """Codes of the nearest values, uint8 in the shape of the weight."""
    return grid.codes(weight).to(torch.uint8)


def round_error_feedback(
    layer: Layer, weight: Tensor, grid: Values, curvature: Tensor | None, zeros: Tensor | None = None
) -> Tensor:
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
        zeros: Which weights are zero, whatever the others are rounded to; the others make up for what that costs, as in
            SparseGPT (Frantar & Alistarh 2023).

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
    matrix = to_matrix(layer, weight.detach().float())
    groups = zip(
        matrix,
        _column_roundings(layer, grid),
        curvature.to(weight.device),
        [None] * len(matrix) if zeros is None else to_matrix(layer, zeros),
        strict=True,
    )
    codes = torch.stack([_feedback(*group) for group in groups])
    return from_matrix(layer, codes.to(torch.uint8)).contiguous()


ColumnRounding = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""A column, one weight an output, and its place, to its codes and values."""


def _column_roundings(layer: Layer, grid: Values) -> list[ColumnRounding]:
    """How each group rounds a column to the nearest values."""

    def columns(numbers: Tensor) -> Tensor:
        return to_matrix(layer, numbers.expand(layer.shape)).transpose(1, 2)

    def affine(s: Tensor, z: Tensor, top: Tensor) -> ColumnRounding:
        top = top[0]
        low = torch.zeros_like(top)

        def rounding(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
            scale, zero = s[place], z[place]
            code = (column / scale + zero).round_().clamp_(low, top)
            return code, scale * (code - zero)

        return rounding

    def table(values: Tensor) -> ColumnRounding:
        def rounding(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
            code = nearest_codes(values, column[:, None])
            return code[:, 0].float(), values.gather(1, code)[:, 0]

        return rounding

    if isinstance(grid, Grid):
        scale, zero = grid.per_weight(layer.shape)
        return [affine(*x) for x in zip(columns(scale), columns(zero), columns(grid.top), strict=True)]
    assert isinstance(grid, Codebook)  # multiples of a step are rounded with their bits in mind, in ``rate``
    tables = grid.table.flatten(0, -2)
    channel = torch.arange(len(tables), device=tables.device).reshape(grid.table.shape[:-1])
    return [table(tables[index[0]]) for index in columns(channel)]


def _feedback(matrix: Tensor, rounding: ColumnRounding, curvature: Tensor, zeros: Tensor | None) -> Tensor:
    """Codes of one group; the matrix, and which of it has to be zero, have shape (outputs, columns)."""
    order = curvature.diagonal().argsort(descending=True, stable=True)
    w = matrix[:, order].T.contiguous()  # columns become rows: what the loop touches then lies together in memory
    factor = _inverse_factor(curvature[order][:, order])
    codes, places = torch.empty_like(w), order.tolist()
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            place = places[j]
            code, value = rounding(w[j] if zeros is None else w[j].masked_fill(zeros[:, place], 0.0), place)
            error = (w[j] - value) / factor[j, j]
            w[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
            codes[j], errors[j - start] = code, error
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes[order.argsort()].T


def _inverse_factor(curvature: Tensor) -> Tensor:
    """Upper factor U of the damped inverse, H⁻¹ = UᵀU; its rows are the inverses' rows the feedback needs, scaled.

    With rows and columns reversed, P H P = L Lᵀ gives H = R Rᵀ with R = P L P upper triangular, and U = R⁻¹: half the
    work of a factor of the inverse.
    """
    upper = torch.linalg.cholesky(damped(curvature).flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    factor: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
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
        tensor([[1.9091]])
    """
    if not moments.pull.any():
        return weight
    factor = torch.linalg.cholesky(damped(moments.curvature, _CORRECTION_DAMPING))
    pull = torch.cholesky_solve(moments.pull.double().transpose(1, 2), factor).transpose(1, 2)
    return from_matrix(layer, to_matrix(layer, weight.detach().double()) + pull).to(weight.dtype)


def round_layer(
    model: nn.Module,
    layer: Layer,
    bits: Width,
    rounding: str,
    passes: PairedPasses,
    quantizer: Quantizer = AFFINE,
) -> tuple[Values, Tensor]:
    """Values and codes of one layer; the network is left as it is.

    With ``"error_feedback"`` the layer is rounded for the inputs that reach it in the network as it is, such that its
    outputs come near those of the float network: the weight is corrected for the drift of its inputs, rounded with
    error feedback, and on an affine grid its codes and scales are improved by descent.

    Args:
        model: The network, the layers before this one rounded.
        layer: The layer.
        bits: Its bit-width, or one for each of its output channels.
        rounding: ``"nearest"`` or ``"error_feedback"``.
        passes: The calibration batches in the network as it is and in the float one.
        quantizer: How the values are chosen that weights may take.

    Returns:
        The values, and codes, uint8 in the shape of the weight.
    """
    weight = layer_weight(model, layer).detach()
    looks = rounding == "error_feedback" or quantizer.range == "curvature"
    moments = input_moments(layer, weight, passes) if looks else None
    importance = None if moments is None else _importance(layer, moments.curvature)
    zeros = kept_zeros(weight, quantizer.keep_zeros)
    quantizer = quantizer.of_layer(layer)

    def fitted(target: Tensor) -> Values:
        if zeros is None:
            return quantizer.fit(target, bits, layer.channel_shape, importance)
        target = target.masked_fill(zeros, 0.0)
        return with_zero(quantizer.fit(target, bits, layer.channel_shape, importance), target, zeros)

    if moments is None or rounding == "nearest":
        values = fitted(weight)
        return values, round_nearest(weight, values)
    target = corrected_weight(layer, weight, moments)
    values = fitted(target)
    codes = round_error_feedback(layer, target, values, moments.curvature, zeros)
    if not isinstance(values, Grid):
        return values, codes
    return improve(layer, target, values, codes, moments.curvature, zeros)


def _importance(layer: Layer, curvature: Tensor) -> Tensor:
    """The diagonal of the input curvature, in the shape of the weight: what a squared error of each weight costs."""
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    outputs = layer.weights // diagonal.numel()
    return from_matrix(layer, diagonal[:, None].expand(-1, outputs, -1))
