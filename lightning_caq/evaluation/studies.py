"""Studies: what is computed of a run for the sake of understanding it, beyond what quantizing it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_caq.evaluation.landscape import landscape, plane
from lightning_caq.evaluation.shares import observed_errors, rounding_energies
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding.bias_correction import bias_corrections
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, profile_quantizer
from lightning_caq.network.batches import take_samples
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import make_objective
from lightning_caq.studies import Energy, Landscape, Studies
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved

if TYPE_CHECKING:
    from lightning_caq.network.objective import Loss
    from lightning_caq.plan import QuantizationPlan
    from lightning_caq.profile import CurvatureProfile

FEW_SAMPLES = 64  # enough to judge a prediction by, and to draw a landscape


def study(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    profile: CurvatureProfile,
    plan: QuantizationPlan,
    *,
    bits: Sequence[int],
    loss_fn: Loss | None = None,
    with_energies: bool = False,
    with_landscape: bool = False,
) -> Studies:
    """Everything about one run that needs the float network once more.

    Costs, in forward passes over the samples that the profile was measured on: one a layer and one more (``alone``);
    in passes over at most 64 of them: what ``tightness`` says, for each bit-width, and 226 with a dozen Hessian–vector
    products for the landscape. The energies cost what the spectrum of the profile cost.

    Args:
        model: The float network; left as it was.
        layers: The layers that are quantized.
        batches: The calibration batches.
        profile: What was measured on their first samples.
        plan: The plan that was made for the network.
        bits: Bit-widths for which predictions are compared with observations.
        loss_fn: Loss of a model and a batch, for the objective ``"task"``.
        with_energies: Whether to compute ``energies``.
        with_landscape: Whether to compute ``landscape``.

    Returns:
        The studies; ``points`` and ``eigenpairs``, which take further runs, and ``training`` are left empty.
    """
    samples = take_samples(batches, profile.samples)
    few = take_samples(samples, FEW_SAMPLES)
    chosen = {x.name: x for x in plan.layers}
    with curvature_safe(model), preserved(model), differentiable(model, layers):
        nearest, rounded, quantizer = {}, {}, profile_quantizer(profile)
        for layer in layers:
            weight, width = layer_weight(model, layer).detach(), plan.widths[layer.name]
            nearest[layer.name] = nearest_errors(model, layer, [width], quantizer)[width]
            rounded[layer.name] = chosen[layer.name].values.to(weight) - weight
        widths = {name: {plan.widths[name]: error} for name, error in nearest.items()}
        corrections = bias_corrections(model, layers, samples, widths)
        shifts = {name: found[plan.widths[name]] for name, found in corrections.items()}
        energies: dict[str, Energy] = {}
        if with_energies:
            target = make_objective(profile.objective, model, samples, loss_fn)
            energies = rounding_energies(model, layers, target, rounded, profile)
        return Studies(
            alone=observed_errors(model, layers, samples, nearest, shifts),
            energies=energies,
            tightness={
                b: tightness(model, layers, few, profile, {layer.name: b for layer in layers})
                for b in sorted(set(bits))
            },
            landscape=_landscape(model, layers, few, profile, rounded, loss_fn) if with_landscape else None,
        )


def _landscape(
    model: nn.Module,
    layers: Sequence[Layer],
    samples: Sequence[Any],
    profile: CurvatureProfile,
    errors: Mapping[str, Tensor],
    loss_fn: Loss | None,
) -> Landscape | None:
    if not any(bool(error.any()) for error in errors.values()):
        return None
    target = make_objective(profile.objective, model, samples, loss_fn)
    short, long = plane(model, layers, target, errors, seed=profile.seed)
    return landscape(model, layers, target, short, long, errors)
