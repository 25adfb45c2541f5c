"""Explain: all that ``study=True`` computes of a run, after the contest is decided and the network is float again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_caq.allocation.budget import AvgBits
from lightning_caq.allocation.choose import Choice
from lightning_caq.evaluation.eigenpairs import COUNTS, profiles_by_eigenpairs
from lightning_caq.evaluation.studies import study
from lightning_caq.measures.measure import differentiable
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, profile_quantizer
from lightning_caq.network.batches import take_samples
from lightning_caq.network.objective import Loss, make_objective
from lightning_caq.plan import QuantizationPlan
from lightning_caq.selection.select import Contest
from lightning_caq.studies import Studies, SweepPoint
from lightning_caq.utilities.contexts import curvature_safe
from lightning_caq.utilities.isolation import preserved

_METHOD = "cet"  # the method that looks at eigenpairs
_NEEDS = frozenset({"rounding_error", "subspace", "loss_change"})


def explain(contest: Contest, plan: QuantizationPlan, batches: Sequence[Any], loss_fn: Loss | None = None) -> Studies:
    """Everything that needs the float network once more; it meets no other process, so one of them may do it alone.

    Args:
        contest: The contest that made the plan, its network float again.
        plan: The plan.
        batches: The calibration batches.
        loss_fn: Loss of a model and a batch, for the objective ``"task"``.

    Returns:
        The studies, ``eigenpairs`` among them where bits are given to whole layers.
    """
    workshop, options, profile = contest.workshop, contest.options, contest.chooser.profile
    found = study(
        workshop.model, workshop.layers, batches, profile, plan, bits=options.bits, loss_fn=loss_fn,
        with_energies=True, with_landscape=True,
    )  # fmt: skip
    return replace(found, eigenpairs=eigenpair_points(contest, plan.avg_bits, batches, loss_fn))


def eigenpair_points(
    contest: Contest,
    avg_bits: float,
    batches: Sequence[Any],
    loss_fn: Loss | None = None,
    counts: Sequence[int] = COUNTS,
) -> tuple[SweepPoint, ...]:
    """The network allocated by ``cet`` with other numbers of eigenpairs, at the same size (CET figure 3).

    Costs one spectrum, and a rounding for each allocation that was not made before: where more eigenpairs change no
    layer's bits, they change nothing.

    Args:
        contest: Chooses bits and makes networks; its network is float, before and after.
        avg_bits: The size of all networks, average bits a weight.
        batches: The calibration batches, on which the networks are judged.
        loss_fn: Loss of a model and a batch, for the objective ``"task"``.
        counts: The numbers of eigenpairs.

    Returns:
        One point a number, with the value of the objective; none where the profile holds too little, or channels of
        one layer have bits of their own, or bits of inputs are chosen too.
    """
    workshop, options, profile = contest.workshop, contest.options, contest.chooser.profile
    if not set(profile.needs) >= _NEEDS or contest.chooser.granularity != "layer" or contest.chooser.inputs:
        return ()
    model, layers = workshop.model, workshop.layers
    judge = make_objective(options.objective, model, batches, loss_fn)
    with curvature_safe(model), preserved(model), differentiable(model, layers):
        target = make_objective(options.objective, model, take_samples(batches, profile.samples), loss_fn)
        quantizer = profile_quantizer(profile)
        deltas = {layer.name: nearest_errors(model, layer, options.bits, quantizer) for layer in layers}
        profiles = profiles_by_eigenpairs(model, layers, target, deltas, profile, counts)
    made: dict[Choice, SweepPoint] = {}
    points = []
    for k, known in profiles.items():
        choice = replace(contest.chooser, profile=known).choose(_METHOD, AvgBits(avg_bits))
        if choice not in made:
            made_of = workshop.attempt(_METHOD, f"avg_bits={avg_bits:.4g}", choice).plan
            made[choice] = SweepPoint(_METHOD, made_of.avg_bits, made_of.ratio, {judge.name: judge.value(model)})
            workshop.restore()
        points.append(replace(made[choice], eigenpairs=k))
    return tuple(points)
