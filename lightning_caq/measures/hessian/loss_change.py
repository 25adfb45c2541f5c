"""Loss changes: what rounding one layer really does to the loss, where the quadratic model may fail (CET Eq. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.loss_sample import LossSample, changes_cost, draw_loss_sample
from lightning_caq.measures.hessian.subspace import spectrum
from lightning_caq.measures.hessian.validity import is_predicted
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.layers import Layer
from lightning_caq.profile import CurvatureProfile, LayerCurvature


@dataclass(frozen=True)
class FirstOrder:
    """The objective at the float weights, to first order.

    Attributes:
        value: ℓ(w), nat.
        gradients: Layer name to ∂ℓ/∂W_i; empty for ``distill``, whose minimum the float weights are.
    """

    value: float
    gradients: Mapping[str, Tensor]

    def change(self, name: str, delta: Tensor) -> float:
        """gᵀΔ of an error of one layer, nat."""
        return float((self.gradients[name] * delta).sum()) if self.gradients else 0.0


def first_order(measurement: Measurement) -> FirstOrder:
    """Value and gradient of the objective at the float weights."""
    m = measurement
    value = m.objective.value(m.model)
    if m.objective.name == "distill":
        return FirstOrder(value, {})
    gradient = Hessian(m.model, m.layers, m.objective, sharing=m.sharing).gradient()
    return FirstOrder(value, {layer.name: g for layer, g in zip(m.layers, gradient, strict=True)})


def loss_sample(measurement: Measurement) -> LossSample:
    """The samples that changes of the loss are measured on."""
    return draw_loss_sample(measurement, measurement.once(spectrum).sample_energies)


def with_changes(
    measurement: Measurement, layer: Layer, row: LayerCurvature, errors: Mapping[int, Tensor]
) -> LayerCurvature:
    """A row with the changes of the loss, measured from the fewest bits up until the quadratic model predicts one.

    The error shrinks with every bit, so a model that holds at one bit-width is taken to hold at the larger ones.

    Args:
        measurement: What is measured.
        layer: The layer.
        row: Its row, or one of its groups of channels, with ``second_order``.
        errors: Bits to the error of the weights that the row is about, in the shape of the layer's weight.
    """
    m, expansion, sample = measurement, measurement.once(first_order), measurement.once(loss_sample)
    slopes = {b: expansion.change(layer.name, d) for b, d in errors.items()}
    changes: dict[int, float] = {}
    outside = []
    for b in sorted(errors):
        changes[b] = sample.change(m.model, layer, errors[b])
        if is_predicted(changes[b], slopes[b] + 0.5 * row.second_order[b]):
            break
        outside.append(b)
    return replace(row, first_order=slopes, loss_change=changes, outside=tuple(outside))


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """First-order changes, and measured ones up to the bit-width at which the quadratic model holds."""
    measurement.once(first_order)  # by all processes together, those without layers of their own too
    errors, layers = measurement.once(layer_errors), {x.name: x for x in measurement.rank_layers}
    return profile.with_rows(lambda row: with_changes(measurement, layers[row.name], row, errors[row.name]))


MEASURE = Measure(
    "loss_change",
    step="validity of the quadratic model",
    take=take,
    cost=lambda extent: changes_cost(extent, extent.layers),
    needs=frozenset({"rounding_error", "subspace"}),
    collective=True,
)
