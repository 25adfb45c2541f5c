"""Explain: all that ``study=True`` computes of a run, once its network is selected and float again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_caq.allocation.budget import AvgBits
from lightning_caq.allocation.choose import Choice, Chooser
from lightning_caq.evaluation.eigenpairs import COUNTS, profiles_by_eigenpairs
from lightning_caq.evaluation.studies import study
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, profile_quantizer
from lightning_caq.network.batches import take_samples
from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.objective import Objective
from lightning_caq.plan import QuantizationPlan
from lightning_caq.selection.candidate import CandidateMaker
from lightning_caq.studies import Studies, SweepPoint
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved

_METHOD = "cet"  # the method that looks at eigenpairs
_NEEDS = frozenset({"rounding_error", "subspace", "loss_change"})


def explain(
    maker: CandidateMaker,
    chooser: Chooser,
    *,
    objective: Objective,
    reference: Reference,
    plan: QuantizationPlan,
) -> Studies:
    """Everything that needs the float network once more; it meets no other process, so one of them may do it alone.

    Args:
        maker: Makes networks; its network is float, before and after.
        chooser: Chooses bits, by what was measured.
        objective: The calibration objective.
        reference: The float network's outputs on the same samples.
        plan: The plan of the network that was selected.

    Returns:
        The studies, ``eigenpairs`` among them where bits are given to whole layers.
    """
    studies = study(
        maker.model,
        maker.layers,
        objective=objective,
        reference=reference,
        profile=chooser.profile,
        plan=plan,
        bits=chooser.bits,
    )
    return replace(studies, eigenpairs=eigenpair_points(maker, chooser, objective, plan.avg_bits))


def eigenpair_points(
    maker: CandidateMaker,
    chooser: Chooser,
    objective: Objective,
    avg_bits: float,
    counts: Sequence[int] = COUNTS,
) -> tuple[SweepPoint, ...]:
    """The network allocated by ``cet`` with other numbers of eigenpairs, at the same size (CET figure 3).

    Costs one spectrum, and a rounding for each allocation that was not made before: where more eigenpairs change no
    layer's bits, they change nothing.

    Args:
        maker: Makes networks; its network is float, before and after.
        chooser: Chooses bits, by what was measured.
        objective: The calibration objective, by which the networks are judged.
        avg_bits: The size of all networks, average bits a weight.
        counts: The numbers of eigenpairs.

    Returns:
        One point a number, with the value of the objective; none where the profile holds too little, or channels of
        one layer have bits of their own, or bits of inputs are chosen too.
    """
    profile, model, layers = chooser.profile, maker.model, maker.layers
    if not set(profile.needs) >= _NEEDS or chooser.granularity != "layer" or chooser.inputs:
        return ()
    with curvature_safe(model), preserved(model), differentiable(model, layers):
        measured = objective.on(model, take_samples(objective.batches, profile.samples))
        quantizer = profile_quantizer(profile)
        deltas = {layer.name: nearest_errors(model, layer, chooser.bits, quantizer) for layer in layers}
        profiles = profiles_by_eigenpairs(model, layers, measured, deltas, profile, counts)
    made: dict[Choice, SweepPoint] = {}
    points = []
    for k, by_count in profiles.items():
        choice = replace(chooser, profile=by_count).choose(_METHOD, AvgBits(avg_bits))
        if choice not in made:
            with maker.made(_METHOD, f"avg_bits={avg_bits:.4g}", choice) as candidate:
                plan, metrics = candidate.plan, {objective.name: objective.value(model)}
            made[choice] = SweepPoint(_METHOD, plan.avg_bits, plan.ratio, metrics)
        points.append(replace(made[choice], eigenpairs=k))
    return tuple(points)
