"""Studies: what is computed of a run for the sake of understanding it, beyond what quantizing it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_caq.evaluation.landscape import landscape, plane
from lightning_caq.evaluation.shares import observed_errors, rounding_energies
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding.bias_correction import bias_corrections
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, profile_quantizer
from lightning_caq.network.batches import take_samples
from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.network.objective import Objective
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.studies import Landscape, Studies
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved

FEW_SAMPLES = 64  # enough to judge a prediction by, and to draw a landscape


def study(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    objective: Objective,
    reference: Reference,
    profile: CurvatureProfile,
    plan: QuantizationPlan,
    bits: Sequence[int],
) -> Studies:
    """Everything about one run that needs the float network once more.

    Costs, in forward passes over the samples that the profile was measured on: one a layer (``alone``); in passes over
    at most 64 of them: what ``tightness`` says, for each bit-width, and 226 with a dozen Hessian–vector products for
    the landscape. The energies cost what the spectrum of the profile cost.

    Args:
        model: The float network; left as it was.
        layers: The layers that are quantized.
        objective: The calibration objective.
        reference: The float network's outputs on the same samples.
        profile: What was measured on the first of them.
        plan: The plan that was made for the network.
        bits: Bit-widths for which predictions are compared with observations.

    Returns:
        The studies; ``points`` and ``eigenpairs``, which take further runs, and ``training`` are left empty.
    """
    codes = {x.name: x for x in plan.layers}
    with curvature_safe(model), preserved(model), differentiable(model, layers):
        samples = take_samples(reference.batches, profile.samples)
        measured, outputs = objective.on(model, samples), reference.on(model, samples)
        nearest, rounded, quantizer = {}, {}, profile_quantizer(profile)
        for layer in layers:
            weight, width = layer_weight(model, layer).detach(), plan.widths[layer.name]
            nearest[layer.name] = nearest_errors(model, layer, [width], quantizer)[width]
            rounded[layer.name] = codes[layer.name].values.to(weight) - weight
        widths = {name: {plan.widths[name]: error} for name, error in nearest.items()}
        corrections = bias_corrections(model, layers, samples, widths)
        shifts = {name: by_width[plan.widths[name]] for name, by_width in corrections.items()}
        few = take_samples(samples, FEW_SAMPLES)
        few_outputs = outputs.on(model, few)
        return Studies(
            alone=observed_errors(model, layers, outputs, nearest, shifts),
            energies=rounding_energies(model, layers, measured, rounded, profile),
            tightness={
                b: tightness(model, layers, few_outputs, profile, {layer.name: b for layer in layers})
                for b in sorted(set(bits))
            },
            landscape=_landscape(model, layers, measured.on(model, few), rounded, profile.seed),
        )


def _landscape(
    model: nn.Module, layers: Sequence[Layer], objective: Objective, errors: Mapping[str, Tensor], seed: int
) -> Landscape | None:
    if not any(bool(error.any()) for error in errors.values()):
        return None
    short, long = plane(model, layers, objective, errors, seed=seed)
    return landscape(model, layers, objective, short, long, errors)
