"""Distribution distance: how much rounding changes the distribution of a layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.layers import layer_weight
from lightning_caq.profile import CurvatureProfile

_BINS = 64


def distribution_distance(weight: Tensor, deltas: Mapping[int, Tensor], bins: int = _BINS) -> dict[int, float]:
    """Jensen–Shannon divergence between histograms of the float weights W and of the rounded ones W + Δ(b), nat.

        JS = ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = (p + q) / 2

    Between 0 and log 2, finite where one of the two has empty bins, and blind to the scale of the layer. The bins are
    equally wide, from the smallest to the largest value of either. A source of such measures is Lin (1991); that the
    distribution of the weights tells which bit-width fits is the idea of DMBQ (Zhao, Yue and Hu 2021).

    Args:
        weight: The float weights.
        deltas: Bits to Δ(b), in the shape of the weight.
        bins: Number of bins.

    Returns:
        Bits to divergence; 0 where rounding changes nothing.

    Example:
        >>> weight = torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> distances = distribution_distance(weight, {1: torch.tensor([0.0, 0.0, -1.0, -1.0]), 8: torch.zeros(4)})
        >>> {bits: round(distance, 4) for bits, distance in distances.items()}  # p = (½, ½), q = (1, 0)
        {1: 0.2158, 8: 0.0}
    """
    floats = weight.detach().double().flatten().cpu()
    return {b: _divergence(floats, floats + d.double().flatten().cpu(), bins) for b, d in deltas.items()}


def _divergence(first: Tensor, second: Tensor, bins: int) -> float:
    both = torch.stack([first, second])
    low, high = float(both.min()), float(both.max())
    if high <= low:
        return 0.0
    p, q = (torch.histc(values, bins, low, high) / values.numel() for values in both)
    middle = (p + q) / 2
    return float(0.5 * (torch.xlogy(p, p) + torch.xlogy(q, q)).sum() - torch.xlogy(middle, middle).sum())


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The distance of every layer at every bit-width."""
    errors = measurement.once(layer_errors)
    weights = {layer.name: layer_weight(measurement.model, layer) for layer in measurement.rank_layers}
    return profile.with_rows(
        lambda row: replace(row, distribution_distance=distribution_distance(weights[row.name], errors[row.name]))
    )


MEASURE = Measure("distribution_distance", step="rounding errors", take=take, needs=frozenset({"rounding_error"}))
