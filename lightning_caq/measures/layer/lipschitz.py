"""L: how much a layer can stretch its input (CAQ 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.hessian.lanczos import lanczos
from lightning_caq.measures.layer.blocks import Block, measured_blocks
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layers import apply_weight
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.utilities import seeding

_TOLERANCE = 1e-2  # of L²: to be nearer takes three times as long, of convolutions of large images above all


def lipschitz(block: Block, generator: torch.Generator, *, tolerance: float = 1e-4) -> tuple[float, float]:
    """L_i: σ_max of the layer's true linear operator, times the Lipschitz constants of what follows it; out/in.

    A convolution counts as an operator on images of the size it met, with its stride and padding; an embedding as the
    matrix that multiplies one-hot words. σ_max² is the largest eigenvalue of WᵀW, found by Lanczos, whose residual
    bounds the distance to an eigenvalue.

    Args:
        block: The layer and what follows it, with its inputs.
        generator: Draws the starting vector.
        tolerance: Largest relative residual of σ_max².

    Returns:
        L_i, and the relative residual: half of it bounds the relative error of L_i.
    """
    module, weight = block.module, block.module.weight
    assert isinstance(weight, Tensor)
    shape = _input_shape(block)

    def stretch(x: Tensor) -> Tensor:
        return x @ weight if block.layer.kind == "embedding" else apply_weight(module, weight, x)

    value, residual = squared_norm(stretch, weight.new_zeros(shape), generator, tolerance)
    return value**0.5 * block.after_lipschitz, residual / value if value > 0 else 0.0


def squared_norm(
    function: Callable[[Tensor], Tensor], like: Tensor, generator: torch.Generator, tolerance: float
) -> tuple[float, float]:
    """σ_max² of the linear part of an affine function, the largest eigenvalue of MᵀM, by Lanczos; (out/in)².

    Args:
        function: The affine function x ↦ M x + c.
        like: A tensor of the shape, type and device of x.
        generator: Draws the starting vector.
        tolerance: Largest relative residual.

    Returns:
        σ_max², and its residual, in the same unit: an eigenvalue lies that near.

    Example:
        >>> M = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> value, _ = squared_norm(lambda x: M @ x + 1, torch.zeros(2), torch.Generator().manual_seed(0), 1e-4)
        >>> round(value, 3)
        9.0
    """
    offset = function(torch.zeros_like(like)).detach()

    def gram_product(v: Tensor) -> Tensor:
        with torch.enable_grad():
            x = v.reshape(like.shape).detach().requires_grad_()
            return torch.autograd.grad(0.5 * (function(x) - offset).square().sum(), x)[0].flatten()

    start = torch.randn(like.numel(), generator=generator).to(like)
    top = lanczos(gram_product, start, 1, tolerance=tolerance, max_steps=200)
    return max(float(top.values[0]), 0.0), float(top.residuals[0])


def _input_shape(block: Block) -> torch.Size:
    if block.layer.kind == "embedding":
        return torch.Size(block.layer.shape[:1])
    # A linear layer does the same to every token: one of them stands for all.
    return block.inputs.shape[-1:] if block.layer.kind == "linear" else block.inputs[:1].shape


def table_constants(measurement: Measurement) -> dict[str, tuple[float, float]]:
    """L and its tolerance of every embedding that the first batch reaches, by its name; κ follows from it too."""
    blocks = measurement.once(measured_blocks)
    return {x: _constant(measurement, block) for x, block in blocks.items() if block.layer.kind == "embedding"}


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """L of every layer; 0 where the first batch does not reach it."""
    blocks, tables = measurement.once(measured_blocks), measurement.once(table_constants)

    def fill(row: LayerCurvature) -> LayerCurvature:
        constant, tolerance = 0.0, 0.0
        if row.name in blocks:
            constant, tolerance = tables.get(row.name) or _constant(measurement, blocks[row.name])
        return replace(row, lipschitz=constant, lipschitz_tolerance=tolerance)

    return profile.with_rows(fill)


def _constant(measurement: Measurement, block: Block) -> tuple[float, float]:
    draws = seeding.generator(measurement.seed, f"lipschitz/{block.layer.name}")
    return lipschitz(block, draws, tolerance=_TOLERANCE)


MEASURE = Measure(
    "lipschitz",
    step="curvature and Lipschitz constants",
    take=take,
    cost=lambda extent: Cost(100 / extent.samples),  # on one sample, however many there are
    needs=frozenset({"output_norm"}),
)
