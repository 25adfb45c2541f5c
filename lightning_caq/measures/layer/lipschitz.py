"""L: how much a layer can stretch its input (CAQ 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_caq.measures.hessian.lanczos import lanczos
from lightning_caq.measures.layer.blocks import Block
from lightning_caq.network.layers import apply_weight


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


def local_lipschitz(
    block: Block, generator: torch.Generator, *, iterations: int = 50, tolerance: float = 1e-3
) -> tuple[float, float]:
    """Largest Jacobian norm of a layer and what follows it over its sample inputs, max_s ‖∂f_i/∂z(z_s)‖₂; out/in.

    A lower bound on L_i, and much tighter in practice: an activation that is flat at the samples counts as flat.
    Power iteration with JᵀJ for all samples (of a linear layer, all tokens) at once; ‖J v‖ of a unit vector v is a
    lower bound on each sample's norm that grows with every step. An embedding is probed along each word's own one-hot
    coordinate, where its Jacobian is the word's row: with nothing behind it, the largest norm of a row in use, exactly.

    Args:
        block: The layer and what follows it, with its inputs.
        generator: Draws the starting vectors.
        iterations: Most products with JᵀJ.
        tolerance: Stop once the largest norm grows by less than this, relatively.

    Returns:
        The largest norm, and the relative change of the last step; what is still missing may be more than that.

    Example:
        >>> from lightning_caq.network.layers import Layer
        >>> scale = torch.nn.Linear(2, 2)
        >>> _ = scale.weight.data.copy_(torch.diag(torch.tensor([1.0, 3.0])))
        >>> block = Block(Layer("scale", "linear", (2, 2)), scale, torch.randn(4, 2))
        >>> round(local_lipschitz(block, torch.Generator().manual_seed(0))[0], 3)
        3.0
    """
    if block.layer.kind == "embedding":
        return _largest_word(block), 0.0
    z = block.inputs.clone().requires_grad_()
    with torch.enable_grad():
        output = block(z)
        u = torch.zeros_like(output, requires_grad=True)
        # Jᵀu is linear in u: its derivative along v is J v, and no pass forward is needed again.
        (pulled,) = torch.autograd.grad(output, z, u, create_graph=True)
    axes = (-1,) if block.layer.kind == "linear" else tuple(range(1, z.ndim))
    v = torch.randn(z.shape, generator=generator).to(z)
    largest, change = 0.0, 1.0
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v, dim=axes, keepdim=True).clamp_min(1e-30)
        (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
        norm = float(torch.linalg.vector_norm(pushed, dim=axes).max())
        change = abs(norm - largest) / norm if norm > 0 else 0.0
        largest = norm
        if change <= tolerance:
            break
        (v,) = torch.autograd.grad(output, z, pushed, retain_graph=True)
    return largest, change


def _largest_word(block: Block) -> float:
    """Largest Jacobian norm along the words' own one-hot coordinates; words do not mix, so one product has them all."""
    table = block.module.weight
    assert isinstance(table, Tensor)

    def along(own: Tensor) -> Tensor:
        output = own[..., None] * table.detach()[block.inputs]
        for function, args, kwargs in block.steps:
            output = function(output, *args, **kwargs)
        return output

    ones = torch.ones_like(block.inputs, dtype=table.dtype)
    gain: Tensor = torch.func.jvp(along, (ones,), (ones,))[1]
    return float(gain.norm(dim=-1).max())


def _input_shape(block: Block) -> torch.Size:
    if block.layer.kind == "embedding":
        return torch.Size(block.layer.shape[:1])
    # A linear layer does the same to every token: one of them stands for all.
    return block.inputs.shape[-1:] if block.layer.kind == "linear" else block.inputs[:1].shape
