"""Local L: how much a layer stretches small changes of the inputs that reach it (CAQ 2.1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.layer.blocks import Block, measured_blocks
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.utilities import seeding


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

    def along(coordinate: Tensor) -> Tensor:
        output = coordinate[..., None] * table.detach()[block.inputs]
        for function, args, kwargs in block.steps:
            output = function(output, *args, **kwargs)
        return output

    ones = torch.ones_like(block.inputs, dtype=table.dtype)
    gain: Tensor = torch.func.jvp(along, (ones,), (ones,))[1]
    return float(gain.norm(dim=-1).max())


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Local L of every layer that the first batch reaches."""
    blocks = measurement.once(measured_blocks)

    def fill(row: LayerCurvature) -> LayerCurvature:
        if row.name not in blocks:
            return row
        draws = seeding.generator(measurement.seed, f"local_lipschitz/{row.name}")
        largest, tolerance = local_lipschitz(blocks[row.name], draws)
        return replace(row, local_lipschitz=largest, local_lipschitz_tolerance=tolerance)

    return profile.with_rows(fill)


MEASURE = Measure(
    "local_lipschitz",
    step="curvature and Lipschitz constants",
    take=take,
    cost=lambda extent: Cost(26 * extent.block),
    needs=frozenset({"output_norm"}),
)
