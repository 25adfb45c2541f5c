"""Costs of rounding activations: what the network's outputs lose when the input of one layer is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.layers import Layer
from lightning_caq.network.objective import Objective
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.calibration import rounded_inputs, sample_inputs
from lightning_caq.quantizers.grids.activations import fit_input_grid


def activation_costs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], objective: Objective, bits: Sequence[int]
) -> Tensor:
    """Change of the objective with the input of one layer rounded, every weight and every other input as it is.

    In the unit of the objective, so that it adds to costs of weights in that unit: to CET's under ``"distill"``, where
    both are divergences in nat. Exact for a single input; that costs of several inputs add up is the same assumption
    that is made of weights. One forward pass a layer and bit-width, and one more.

    Args:
        model: The float network, in eval mode; left as it was.
        layers: The layers.
        batches: Samples that ranges are chosen by.
        objective: The objective.
        bits: Candidate bit-widths of inputs.

    Returns:
        Costs in nat, float64, shape (layers, bit-widths); zero for a layer that takes no floating-point numbers.

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(1, 1, bias=False), torch.tensor([[0.0], [3.0], [1.4]])
        >>> _ = nn.init.ones_(net.weight)
        >>> layers = [Layer("", "linear", (1, 1), calls=1, modules=("",))]
        >>> activation_costs(net, layers, [x], make_objective("distill", net, [x]), [8])[0, 0] < 1e-4
        tensor(True)
    """
    samples = sample_inputs(model, layers, batches)
    before = objective.value(model)
    costs = torch.zeros(len(layers), len(bits), dtype=torch.float64)
    for row, layer in enumerate(layers):
        if layer.name not in samples:
            continue
        for column, b in enumerate(bits):
            with rounded_inputs(model, [layer], {layer.name: fit_input_grid(samples[layer.name], b)}):
                costs[row, column] = objective.value(model) - before
    return costs


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Costs of every layer's input, at 2 bits and more."""
    m, bits = measurement, [b for b in measurement.bits if b >= 2]
    table = activation_costs(m.model, m.rank_layers, m.batches, m.objective, bits).tolist()
    costs = {layer.name: dict(zip(bits, row, strict=True)) for layer, row in zip(m.rank_layers, table, strict=True)}
    return profile.with_rows(lambda row: replace(row, activation_cost=costs[row.name]))


MEASURE = Measure(
    "activation_cost",
    step="costs of rounded inputs",
    take=take,
    cost=lambda extent: Cost(0.2 * extent.layers * extent.bits),
)
