"""κ and ρ: how far a layer is from linear (CAQ 2.1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.measures.layer.blocks import Block

_INPUT_BITS = 4
_FINALISTS, _HEATS = 8, 3


def second_order_sensitivity(
    block: Block, generator: torch.Generator, *, iterations: int = 50, tolerance: float = 1e-3
) -> tuple[float, float]:
    """κ_i: the largest operator norm of ∇²_z s(z) over the samples, s(z) = ‖f_i(z)‖²; unit out²/in².

    Power iteration, for all samples at once, on v ↦ H v = d/dt ∇s(z + t v) at t = 0 (Pearlmutter 1994), from Rademacher
    vectors. Each sample's norm ‖H v‖ is a lower bound that grows towards the operator norm. The mean of ‖H v‖ over
    random v, which the proposal suggests, is far below it (``rademacher_sensitivity``). Of more than eight samples, the
    eight with the largest norms after three products are iterated to the end.

    Args:
        block: The layer and what follows it, with its inputs.
        generator: Draws the starting vectors.
        iterations: Most products.
        tolerance: Stop once the largest norm changes by less than this, relatively.

    Returns:
        κ_i, and the relative change of the last step.
    """
    v = _signs(block.inputs, generator)
    if len(v) > _FINALISTS:
        v, norms, _ = _power_iteration(block, v, _HEATS, tolerance)
        best = norms.topk(_FINALISTS).indices
        block, v = replace(block, inputs=block.inputs[best]), v[best]
    _, norms, change = _power_iteration(block, v, iterations, tolerance)
    return float(norms.max()), change


def _power_iteration(block: Block, v: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """V after some products with every sample's Hessian, ‖H v‖ / ‖v‖ of each, and the last change of the largest."""
    z, slope = _slope(block)
    norms, change = v.new_zeros(len(v)), 0.0
    # A slope that does not depend on z has no graph left: the second derivative is zero.
    for _ in range(iterations if slope.requires_grad else 0):
        v = v / _norms(v).clamp_min(1e-30)
        (v,) = torch.autograd.grad(slope, z, v, retain_graph=True)
        before, norms = float(norms.max()), _norms(v).flatten()
        largest = float(norms.max())
        change = abs(largest - before) / largest if largest > 0 else 0.0
        if change <= tolerance:
            break
    return v, norms, change


def rademacher_sensitivity(block: Block, generator: torch.Generator, vectors: int = 20) -> tuple[float, float]:
    """The proposal's κ_i: the mean over samples and random signs v of ‖∇²s(z) v‖ / ‖v‖, s(z) = ‖f_i(z)‖²; out²/in².

    Biased low as an estimate of the operator norm, and more so in more dimensions d: it is near ‖∇²s‖_F / √d, the root
    mean square of the eigenvalues, where the norm is the largest of them. It also averages over samples where
    ``second_order_sensitivity`` takes the largest. The standard error says how far it is from its own expectation on
    these samples, not from the norm.

    Args:
        block: The layer and what follows it, with its inputs.
        generator: Draws the vectors.
        vectors: Vectors a sample, at least 2, else there is no standard error.

    Returns:
        The mean and its standard error; Student's t with vectors − 1 degrees of freedom makes intervals.

    Example:
        >>> from lightning_caq.network.layers import Layer
        >>> scale = torch.nn.Linear(3, 3)
        >>> _ = scale.weight.data.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
        >>> block = Block(Layer("scale", "linear", (3, 3)), scale, torch.randn(4, 3))
        >>> mean, error = rademacher_sensitivity(block, torch.Generator().manual_seed(0))
        >>> round(mean, 3)  # the root mean square of 2, 8 and 18; the operator norm is 18
        11.431
    """
    z, slope = _slope(block)
    if not slope.requires_grad:
        return 0.0, 0.0
    means = []
    for _ in range(vectors):
        v = _signs(z, generator)
        (image,) = torch.autograd.grad(slope, z, v, retain_graph=True)
        means.append((_norms(image) / _norms(v)).double().mean())
    draws = torch.stack(means)
    return float(draws.mean()), float(draws.std()) / vectors**0.5


def remainder(block: Block, generator: torch.Generator, *, directions: int = 8) -> float:
    """ρ_i: ½ ‖D²f_i(z)[v, v]‖ / ‖v‖² as a second difference at the radius of an input's rounding error; unit out/in².

    ‖f(z + r v) − 2 f(z) + f(z − r v)‖ / (2 r²), r = ‖z‖ 2^−4, the largest over samples and random directions v. At this
    radius the difference sees the kinks of a ReLU that a rounding can cross. A lower bound on the supremum over v.

    Args:
        block: The layer and what follows it, with its inputs.
        generator: Draws the directions.
        directions: Number of directions.

    Returns:
        ρ_i.
    """
    z = block.inputs[block.inputs.flatten(1).any(dim=1)]  # rounding moves no zero
    if not len(z):
        return 0.0
    radius = _norms(z) * 2.0**-_INPUT_BITS
    largest = 0.0
    with torch.no_grad():
        middle = block(z)
        for _ in range(directions):
            v = _signs(z, generator)
            v = v / _norms(v)
            bend = block(z + radius * v) - 2 * middle + block(z - radius * v)
            largest = max(largest, float((_norms(bend).flatten() / (2 * radius.flatten().square())).max()))
    return largest


def _slope(block: Block) -> tuple[Tensor, Tensor]:
    """The inputs z and ∇s(z) with its graph, s(z) = ‖f_i(z)‖²."""
    z = block.inputs.clone().requires_grad_()
    with torch.enable_grad():
        energy = block(z).square().sum()
        (slope,) = torch.autograd.grad(energy, z, create_graph=True)
    return z, slope


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul(2).sub(1).to(like)


def _norms(x: Tensor) -> Tensor:
    """Norm of every sample, shaped to divide ``x``."""
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms.reshape(-1, *[1] * (x.ndim - 1))
