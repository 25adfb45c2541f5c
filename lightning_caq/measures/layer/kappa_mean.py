"""The proposal's own estimator of κ, a mean over random vectors (CAQ 2.1)."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.layer.blocks import Block, measured_blocks
from lightning_caq.measures.layer.energy import energy_slope, random_signs, sample_norms
from lightning_caq.measures.layer.kappa import kappa_draws
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.profile import CurvatureProfile, LayerCurvature


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
    z, slope = energy_slope(block)
    if not slope.requires_grad:
        return 0.0, 0.0
    means = []
    for _ in range(vectors):
        v = random_signs(z, generator)
        (image,) = torch.autograd.grad(slope, z, v, retain_graph=True)
        means.append((sample_norms(image) / sample_norms(v)).double().mean())
    draws = torch.stack(means)
    return float(draws.mean()), float(draws.std()) / vectors**0.5


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The mean and its standard error; an embedding has none."""
    blocks, draws = measurement.once(measured_blocks), measurement.once(kappa_draws)

    def fill(row: LayerCurvature) -> LayerCurvature:
        block = blocks.get(row.name)
        if block is None or block.layer.kind == "embedding":
            return row
        mean, error = rademacher_sensitivity(block, draws[row.name])
        return replace(row, kappa_mean=mean, kappa_mean_stderr=error)

    return profile.with_rows(fill)


MEASURE = Measure(
    "kappa_mean",
    step="curvature and Lipschitz constants",
    take=take,
    cost=lambda extent: Cost(36 * extent.block),
    needs=frozenset({"kappa"}),
)
