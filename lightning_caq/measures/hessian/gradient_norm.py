"""Gradient norms: how much the loss still wants to move each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.hessian.diagonal import layer_diagonals
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.profile import CurvatureProfile


def gradient_norms(model: nn.Module, layers: Sequence[Layer], objective: Objective) -> dict[str, float]:
    """‖g_i‖, g_i = ∂ℓ/∂W_i, nat/weight: the norm of the mean gradient over all samples, whatever the batches' sizes.

    Exact. Zero for ``distill``, whose minimum the float weights are. Costs one gradient.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ.

    Returns:
        Layer name to norm; zeros for a layer that no batch reaches.

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> mean_output = make_objective("task", net, x.split(2), lambda model, batch: model(batch).mean())
        >>> gradient_norms(net, layers, mean_output)[""] ** 2  # of the gradient (6, 8) / 3
        11.1...
    """
    gradient = Hessian(model, layers, objective, graph_memory=0).gradient()
    return {layer.name: float(g.norm(dtype=torch.float64)) for layer, g in zip(layers, gradient, strict=True)}


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """The norm of every layer's gradient; for ``distill``, where it is zero, that of single samples too."""
    norms = gradient_norms(measurement.model, measurement.rank_layers, measurement.objective)
    profile = profile.with_rows(lambda row: replace(row, gradient_norm=norms[row.name]))
    if measurement.objective.name != "distill":
        return profile
    diagonals = measurement.once(layer_diagonals)
    # The trace of E[∇log p(y) ∇log p(y)ᵀ], labels drawn from the outputs, is that of the Gauss–Newton matrix.
    return profile.with_rows(lambda row: replace(row, score_norm=float(diagonals[row.name].double().sum().sqrt())))


MEASURE = Measure(
    "gradient_norm",
    step="gradients and top eigenvalues",
    take=take,
    cost=lambda extent: Cost(1.0, row_passes=int(extent.distill)),
)
