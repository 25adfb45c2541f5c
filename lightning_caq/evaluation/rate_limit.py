"""The limit: the fewest bits that any code of a network's weights could take at the damage that is observed.

Shannon's lower bound on rate at squared error D, with the density p of the weights: R(D) ≥ h(p) − ½ log₂(2πe D), and no
less than 0 (Shannon 1959; tight at high rate, Linkov 1965). Of a layer the error is the one that counts at its output,
per column what no later column takes over: error feedback makes it e H eᵀ, whose share of a weight is D times the
geometric mean of H's conditional variances d_j; the bound is taken at D = (mean of e H eᵀ a weight) / d̄. At one bit
and below the bound lies under what can be reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_caq.plan import QuantizationPlan
from lightning_caq.studies import LayerRate, RateLimit, RatePoint


def differential_entropy(values: NDArray[np.floating]) -> float:
    """h(p) in bits of the density that values are drawn from, by spacings (Vasicek 1976), m = √n.

    Spacings at the ends are those that there are. Equal values count as 1e-12 of the range apart.

    Args:
        values: One-dimensional.

    Returns:
        Bits; −∞ for fewer than two different values.

    Example:
        >>> round(differential_entropy(np.random.default_rng(0).uniform(0, 4, 100_000)), 2)
        2.0
    """
    x = np.sort(values.astype(np.float64).ravel())
    n = len(x)
    if n < 2 or x[-1] == x[0]:
        return -math.inf
    m = max(1, min(round(math.sqrt(n)), n // 2 - 1 if n > 3 else 1))
    upper, lower = np.minimum(np.arange(n) + m, n - 1), np.maximum(np.arange(n) - m, 0)
    spread = np.maximum(x[upper] - x[lower], 1e-12 * (x[-1] - x[0]))
    return float(np.log2(n / (upper - lower) * spread).mean())


def shannon_limit(values: NDArray[np.floating], distortion: float) -> float:
    """Shannon's lower bound at a mean squared error, bits a weight, 0 from the variance of the values up.

    Example:
        >>> w = np.random.default_rng(0).normal(0, 1, 100_000)
        >>> round(shannon_limit(w, 1 / 16), 1), shannon_limit(w, 2.0)
        (2.0, 0.0)
    """
    if distortion <= 0:
        return math.inf
    return max(differential_entropy(values) - 0.5 * math.log2(2 * math.pi * math.e * distortion), 0.0)


def rate_limit(
    weights: Mapping[str, NDArray[np.floating]], distortions: Mapping[str, float], bits: Mapping[str, float]
) -> RateLimit:
    """The limit of every layer at its own distortion.

    Args:
        weights: Layer name to float weights.
        distortions: Layer name to mean squared error a weight.
        bits: Layer name to bits a weight that are stored.

    Example:
        >>> w = {"fc": np.random.default_rng(0).normal(0, 1, 100_000)}
        >>> round(rate_limit(w, {"fc": 1 / 16}, {"fc": 2.5}).gap, 1)
        0.5
    """
    return RateLimit(
        tuple(
            LayerRate(
                name=name,
                weights=int(values.size),
                bits=float(bits[name]),
                limit=shannon_limit(values, distortions[name]),
                distortion=distortions[name],
            )
            for name, values in weights.items()
        )
    )


def plan_limit(model: nn.Module, plan: QuantizationPlan, tried: Sequence[RatePoint] = ()) -> RateLimit | None:
    """The limit of a plan's entropy-coded layers; ``None`` where there are none.

    Args:
        model: The float network that the plan was made of.
        plan: The plan, as it was made.
        tried: The networks that were tried on the way to it.
    """
    layers = [x for x in plan.layers if x.distortion is not None]
    if not layers:
        return None
    weights = {x.name: _weight(model, x.name) for x in layers}
    limit = rate_limit(weights, {x.name: x.distortion or 0.0 for x in layers}, plan.bits)
    return replace(limit, tried=tuple(sorted(tried, key=lambda point: point.bits)))


def _weight(model: nn.Module, name: str) -> NDArray[np.float32]:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    values: NDArray[np.float32] = weight.detach().float().cpu().numpy()
    return values
