"""Diagonals: a cheap stand-in for a layer's Hessian, one number a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.measures.cost import Cost, Extent
from lightning_caq.measures.gram.diagonals import gauss_newton_diagonals
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.measures.rounding.rounding_errors import layer_errors
from lightning_caq.network.batches import batch_size, take_samples
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def fisher_diagonals(model: nn.Module, layers: Sequence[Layer], objective: Objective) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix, E_s[(∂ℓ_s/∂W_i)²] over samples s, nat²/weight².

    With the labels that the loss holds, so it is the Fisher matrix of the model only as far as the model is right
    (Kunstner, Balles and Hennig 2019); its mean over samples is exact. A sample's loss is the loss of a batch of that
    sample alone, so any loss will do. Costs one gradient a sample, in batches of one.

    Args:
        model: The float network, in eval mode.
        layers: The layers.
        objective: The objective ℓ, ``task``.

    Returns:
        Layer name to diagonal, in the shape of the weight.

    Raises:
        OptionError: For ``distill``, where every sample's gradient is zero.
        CalibrationError: If a sample's loss is not a finite scalar.

    Example:
        >>> from lightning_caq.network.objective import make_objective
        >>> net, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> layers = [Layer("", "linear", (1, 2), calls=1, modules=("",))]
        >>> fisher_diagonals(net, layers, make_objective("task", net, [x], lambda model, batch: model(batch).mean()))
        {'': tensor([[0.5000, 2.0000]])}
    """
    if objective.name == "distill":
        raise OptionError("The Fisher diagonal is zero for objective='distill'; use gauss_newton_diagonals.")
    weights = [layer_weight(model, layer) for layer in layers]
    sums = [torch.zeros_like(w, requires_grad=False) for w in weights]
    for b, batch in enumerate(objective.batches):
        for s in range(batch_size(batch)):
            alone = Objective(objective.name, tuple(take_samples([batch], 1, skip=s)), loss=objective.loss)
            try:
                with torch.enable_grad():
                    loss = alone.batch_loss(model, 0)
            except CalibrationError as error:
                raise CalibrationError(f"Sample {s} of calibration batch {b} by itself: {error}") from error
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            for sum_, gradient in zip(sums, gradients, strict=True):
                sum_.addcmul_(gradient, gradient, value=1 / objective.samples)
    return {layer.name: sum_ for layer, sum_ in zip(layers, sums, strict=True)}


def layer_diagonals(measurement: Measurement) -> dict[str, Tensor]:
    """The Gauss–Newton (``distill``) or the empirical Fisher diagonal (``task``) of this process's layers, by name."""
    m, layers = measurement, measurement.rank_layers
    if not layers:
        return {}
    if m.objective.name == "distill":
        return gauss_newton_diagonals(m.model, layers, m.batches, seed=m.seed)[0]
    return fisher_diagonals(m.model, layers, m.objective)


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """Σ_j D_jj Δ_j² at every bit-width."""
    diagonals, errors = measurement.once(layer_diagonals), measurement.once(layer_errors)

    def fill(row: LayerCurvature) -> LayerCurvature:
        diagonal = diagonals[row.name]
        energies = {b: float((diagonal * d.square()).double().sum()) for b, d in errors[row.name].items()}
        return replace(row, diagonal_energy=energies)

    return profile.with_rows(fill)


def _cost(extent: Extent) -> Cost:
    return Cost(row_passes=1) if extent.distill else Cost(4.0)


MEASURE = Measure("diagonal", step="rounding errors", take=take, cost=_cost, needs=frozenset({"rounding_error"}))
