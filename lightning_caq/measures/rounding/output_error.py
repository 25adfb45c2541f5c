"""Output error: how far rounding a layer's weights moves its output (CAQ 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_caq.measures.cost import Cost
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.batches import batch_size
from lightning_caq.network.layer_calls import visit_layers
from lightning_caq.network.layers import Layer, apply_weight
from lightning_caq.profile import CurvatureProfile


def output_errors(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], deltas: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, dict[int, float]]:
    """e_i(b): root mean square over samples of ‖Δ_i(b) z_i‖, in the unit of the layer's output.

    One pass serves all layers.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        batches: The samples.
        deltas: Name of each of the layers to bits to Δ_i(b).

    Returns:
        Layer name to bits to e_i(b); zeros for a layer that no batch reaches.

    Example:
        >>> import torch
        >>> net, x = nn.Linear(2, 1), torch.ones(5, 2)
        >>> delta = torch.tensor([[0.5, 0.25]])
        >>> output_errors(net, [Layer("", "linear", (1, 2), modules=("",))], [x], {"": {3: delta}})
        {'': {3: 0.75}}
    """
    sums = {layer.name: dict.fromkeys(deltas[layer.name], 0.0) for layer in layers}

    def visit(layer: Layer, module: nn.Module, inputs: Tensor) -> None:
        for b, delta in deltas[layer.name].items():
            sums[layer.name][b] += float(apply_weight(module, delta, inputs).double().square().sum())

    visit_layers(model, layers, batches, visit)
    samples = sum(map(batch_size, batches))
    return {name: {b: (total / samples) ** 0.5 for b, total in by_bits.items()} for name, by_bits in sums.items()}


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Output errors of every layer."""
    m = measurement
    errors = output_errors(m.model, m.rank_layers, m.batches, m.once(layer_errors))
    return profile.with_rows(lambda row: replace(row, output_error=errors[row.name]))


MEASURE = Measure(
    "output_error",
    step="rounding errors",
    take=take,
    cost=lambda extent: Cost(0.2 * extent.layers + 0.3 * extent.bits),
    needs=frozenset({"rounding_error"}),
)
