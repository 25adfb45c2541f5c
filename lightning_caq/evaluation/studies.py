"""Studies: what is computed of a run for the sake of understanding it, beyond what quantizing it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_caq.batches import take_samples
from lightning_caq.contexts import curvature_safe
from lightning_caq.evaluation.landscape import Landscape, landscape, plane
from lightning_caq.evaluation.shares import Energy, observed_errors, rounding_energies
from lightning_caq.evaluation.sweep import SweepPoint
from lightning_caq.evaluation.tightness import Tightness, tightness
from lightning_caq.evaluation.training import EpochCurvature
from lightning_caq.isolation import preserved
from lightning_caq.layers import Layer, layer_weight
from lightning_caq.measures.bias_correction import bias_corrections
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding_errors import nearest_errors
from lightning_caq.objective import make_objective

if TYPE_CHECKING:
    from lightning_caq.measures.profile import CurvatureProfile
    from lightning_caq.objective import Loss
    from lightning_caq.plan import QuantizationPlan

FEW_SAMPLES = 64  # enough to judge a prediction by, and to draw a landscape


@dataclass(frozen=True)
class Studies:
    """What was studied; all of it is optional, and empty where it was not.

    Attributes:
        alone: Layer name to the observed error of the network's output with only this layer rounded to nearest at its
            bit-width; root mean square over samples, in the unit of the output.
        energies: Layer name to the energy of the rounding error that the plan makes.
        tightness: Bit-width to predicted and observed output errors with every layer rounded to nearest at it.
        landscape: The loss on a plane of a short and a long axis.
        points: Networks quantized under other budgets, methods or seeds.
        eigenpairs: The network quantized with other numbers of eigenpairs.
        training: The curvature of every layer, epoch by epoch.
    """

    alone: dict[str, float] = field(default_factory=dict)
    energies: dict[str, Energy] = field(default_factory=dict)
    tightness: dict[int, Tightness] = field(default_factory=dict)
    landscape: Landscape | None = None
    points: tuple[SweepPoint, ...] = ()
    eigenpairs: tuple[SweepPoint, ...] = ()
    training: tuple[EpochCurvature, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Studies:
        """The studies that ``dataclasses.asdict`` and a round through JSON made plain.

        Example:
            >>> import json
            >>> from dataclasses import asdict
            >>> studies = Studies({"fc": 0.5}, {"fc": Energy(1.0, 2.0)}, {3: Tightness(1.0, 2.0, 1.7, 1.5, 1.1)})
            >>> Studies.from_dict(json.loads(json.dumps(asdict(studies)))) == studies
            True
        """
        plane_ = data["landscape"]
        return cls(
            alone=dict(data["alone"]),
            energies={name: Energy(**each) for name, each in data["energies"].items()},
            tightness={int(bits): Tightness(**each) for bits, each in data["tightness"].items()},
            landscape=None if plane_ is None else Landscape(**{key: _tuples(x) for key, x in plane_.items()}),
            points=tuple(SweepPoint(**point) for point in data["points"]),
            eigenpairs=tuple(SweepPoint(**point) for point in data["eigenpairs"]),
            training=tuple(EpochCurvature(**each) for each in data.get("training", ())),
        )


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
        nearest, rounded = {}, {}
        for layer in layers:
            weight, width = layer_weight(model, layer).detach(), plan.widths[layer.name]
            nearest[layer.name] = nearest_errors(model, layer, [width])[width]
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


def _tuples(value: Any) -> Any:
    """Lists, which is what JSON has, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
