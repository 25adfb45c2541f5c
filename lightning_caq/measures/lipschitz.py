"""L: how much a layer can stretch its input (CAQ 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.layers import apply_weight
from lightning_caq.measures.blocks import Block
from lightning_caq.measures.lanczos import lanczos


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

    def gram_product(v: Tensor) -> Tensor:
        with torch.enable_grad():
            x = v.reshape(shape).requires_grad_()
            return torch.autograd.grad(0.5 * stretch(x).square().sum(), x)[0].flatten()

    start = torch.randn(shape.numel(), generator=generator).to(weight)
    top = lanczos(gram_product, start, 1, tolerance=tolerance, max_steps=200)
    value = float(top.values[0].clamp_min(0))
    return value**0.5 * block.after_lipschitz, float(top.residuals[0]) / value if value > 0 else 0.0


def _input_shape(block: Block) -> torch.Size:
    if block.layer.kind == "embedding":
        return torch.Size(block.layer.shape[:1])
    # A linear layer does the same to every token: one of them stands for all.
    return block.inputs.shape[-1:] if block.layer.kind == "linear" else block.inputs[:1].shape
