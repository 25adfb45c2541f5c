"""KL divergence: what the network's outputs lose with one layer rounded (ZeroQ)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounded_loss import loss_change
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import make_objective
from lightning_caq.profile import CurvatureProfile


def quantized_kl(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], deltas: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[int, float]]:
    """KL(float ‖ one layer quantized) of the network's outputs, mean over samples, nat (ZeroQ, Cai et al. 2020).

    What ``loss_change`` measures under ``distill``, whatever the objective is; for one output column, half the squared
    difference. Exact. Costs one forward pass a layer and bit-width; the weights are put back.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Layer name to bits to Δ_i(b).

    Returns:
        Layer name to bits to divergence.

    Example:
        >>> import torch
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> divergences = quantized_kl(net, layers, [x], {"": {4: torch.tensor([[0.5, 0.0]])}})
        >>> round(divergences[""][4], 6)  # ½ (0.5² + 0²) / 2
        0.0625
    """
    target = make_objective("distill", model, batches)
    return {
        layer.name: {b: loss_change(model, layer, target, delta, 0.0) for b, delta in deltas[layer.name].items()}
        for layer in layers
    }


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The divergence of every layer at every bit-width."""
    m = measurement
    divergences = quantized_kl(m.model, m.rank_layers, m.batches, m.once(layer_errors))
    return profile.with_rows(lambda row: replace(row, kl=divergences[row.name]))


MEASURE = Measure(
    "kl",
    step="rounding errors",
    take=take,
    cost=lambda extent: Cost(0.35 * extent.layers * extent.bits),
    needs=frozenset({"rounding_error"}),
)
