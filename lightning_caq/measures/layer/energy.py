"""The energy of a layer's output, s(z) = ‖f_i(z)‖², as a function of its input: what κ is the curvature of."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.measures.layer.blocks import Block


def energy_slope(block: Block) -> tuple[Tensor, Tensor]:
    """The inputs z and ∇s(z) with its graph, s(z) = ‖f_i(z)‖²."""
    z = block.inputs.clone().requires_grad_()
    with torch.enable_grad():
        energy = block(z).square().sum()
        (slope,) = torch.autograd.grad(energy, z, create_graph=True)
    return z, slope


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent random signs in the shape and type of a tensor.

    Example:
        >>> random_signs(torch.zeros(3), torch.Generator().manual_seed(0)).abs()
        tensor([1., 1., 1.])
    """
    return torch.randint(0, 2, like.shape, generator=generator).mul(2).sub(1).to(like)


def sample_norms(x: Tensor) -> Tensor:
    """Norm of every sample, shaped to divide ``x``.

    Example:
        >>> sample_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (x.ndim - 1))
