"""The whole road without Lightning: measure → allocate → round → repair → swap → evaluate."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_caq.allocation.budget import MaxDrop, check_budget
from lightning_caq.allocation.choose import Chooser
from lightning_caq.allocation.mixed import MIXED, input_candidates
from lightning_caq.errors import BudgetError, LayerError
from lightning_caq.evaluation.explain_run import explain
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.evaluation.versions import versions
from lightning_caq.measures.hessian.eigenvectors import check_memory
from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounded_loss import rounded_loss
from lightning_caq.network.batches import calibration_batches, take_samples
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import Layer, find_layers, layer_sizes, layer_weight
from lightning_caq.network.objective import Loss, Objective, make_objective
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.values import Quantizer
from lightning_caq.report import LayerRow, QuantizationReport, Size
from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.reporting.html import write_html
from lightning_caq.selection.candidate import Workshop, open_workshop
from lightning_caq.selection.long_axis import find_valley
from lightning_caq.selection.select import Contest
from lightning_caq.sizes import FLOAT_BITS, LayerSizes
from lightning_caq.studies import Tightness
from lightning_caq.utilities.contexts import Evaluate, InFloat32, curvature_safe
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.keywords import known_keywords, takes_fields_of
from lightning_caq.utilities.progress import Progress, Say, duration, silent
from lightning_caq.utilities.sharing import ALONE, Sharing

TIGHTNESS_SAMPLES = 64


@dataclass(frozen=True)
class QuantizationResult:
    """What ``quantize`` gives.

    Attributes:
        model: The quantized network.
        plan: Bits, scales and codes.
        profile: What was measured.
        report: What it cost and what it gave.
    """

    model: nn.Module
    plan: QuantizationPlan
    profile: CurvatureProfile
    report: QuantizationReport

    def to_html(self, path: str | Path) -> Path:
        """Write the run as one self-contained HTML file, figures and all.

        Args:
            path: Where to, such as ``"report.html"``.

        Returns:
            The path.
        """
        return write_html(path, self.report, self.profile, self.plan, draw_gallery(self.report, self.profile))


@takes_fields_of(QuantizationOptions)
def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: Loss | None = None,
    evaluate: Evaluate | None = None,
    profile: CurvatureProfile | None = None,
    inplace: bool = True,
    say: Say = silent,
    **options: Any,
) -> QuantizationResult:
    """Quantize a trained network.

    Args:
        model: The network.
        batches: Re-iterable calibration batches: tensors, tuples whose first item is the input, or dicts.
        options: Every field of QuantizationOptions.
        loss_fn: Loss of a model and a batch, for ``objective="task"``.
        evaluate: Metrics of a network, such as its accuracy; called for the float network, the quantized one and each
            compared one. The calibration objective is always reported.
        profile: A profile of an earlier run; what it holds for the same weights and samples is not measured again, so
            that a second budget costs no second measurement.
        inplace: Whether ``model`` itself is quantized, or a copy.
        say: Called with one line of progress at a time, such as ``print``.

    Returns:
        The network, the plan, the profile and the report.

    Raises:
        OptionError: If an option is not known or not allowed; nothing has then been done.
        CalibrationError: If the batches cannot be used.
        LayerError: If there is nothing to quantize, or weights are not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> import torch
        >>> batches = [torch.randn(32, 8) for _ in range(4)]
        >>> result = quantize(net, batches, avg_bits=3)
        >>> result.plan.avg_bits <= 3
        True
        >>> type(net[0]).__name__
        'FakeQuantLinear'
    """
    chosen = QuantizationOptions(**known_keywords(quantize, options))
    target = model if inplace else copy.deepcopy(model)
    return run(target, batches, chosen, loss_fn=loss_fn, evaluate=evaluate, profile=profile, progress=Progress(say))


def run(
    model: nn.Module,
    batches: Iterable[Any],
    options: QuantizationOptions,
    *,
    loss_fn: Loss | None = None,
    evaluate: Evaluate | None = None,
    profile: CurvatureProfile | None = None,
    progress: Progress | None = None,
    sharing: Sharing = ALONE,
) -> QuantizationResult:
    """Quantize a network in place, with options that were checked. See ``quantize``.

    If anything fails the network is exactly as it was before. Processes that hold the same network and the same batches
    may divide the work of measuring by ``sharing``.
    """
    progress = progress or Progress()
    if quantized_modules(model):
        raise LayerError(
            f"{type(model).__name__} is quantized already; build it anew, with its float weights, to quantize it again."
        )
    device = next((p.device for p in model.parameters()), None)
    # A data loader draws from the global random state as it is read, so that belongs to what is preserved.
    with curvature_safe(model), preserved(model), InFloat32(model) as float32:
        samples = float32.batches(calibration_batches(batches, options.calibration_samples, device))
        found = find_layers(model, samples[0], include=options.include, exclude=options.exclude)
        # Of a layer that no batch calls nothing is known: its weight may be used in another way, as attention does.
        layers, skipped = [x for x in found if x.calls], [x for x in found if not x.calls]
        if not layers:
            raise LayerError("No calibration batch calls any of the layers to quantize; check the batches or include.")
        chosen = {id(layer_weight(model, layer)) for layer in layers}
        left = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in chosen)
        sizes = replace(layer_sizes(layers, left), quantizer=options.quantizer)
        candidates = input_candidates(layers, options.bits, options.activation_bits)
        sizes, most = (replace(sizes, activation_bits=tuple(row[i] for row in candidates)) for i in (0, -1))
        check_budget(options.budget, sizes, options.bits, most)
        if options.rounding == "long_axis":
            check_memory(layers, options.eigenpairs)
        return _Road(
            model,
            layers,
            skipped,
            sizes,
            candidates,
            samples,
            options,
            loss_fn,
            float32.outside(evaluate),
            profile,
            sharing,
            progress,
        ).walk()


@dataclass(frozen=True)
class _Road:
    """The steps of one run over one network, in order."""

    model: nn.Module
    layers: list[Layer]
    skipped: list[Layer]
    sizes: LayerSizes
    candidates: Sequence[Sequence[int]]
    batches: list[Any]
    options: QuantizationOptions
    loss_fn: Loss | None
    evaluate: Evaluate | None
    known: CurvatureProfile | None
    sharing: Sharing
    progress: Progress

    def walk(self) -> QuantizationResult:
        objective = self._announce()
        with self.progress.step("evaluation (float)"):
            metrics = self._judge(objective)
        self._check_monitor(metrics)
        profile = self._measure()
        contest = Contest(
            chooser=self._chooser(profile),
            workshop=self._workshop(profile),
            judge=lambda: self._judge(objective),
            options=self.options,
            progress=self.progress,
            float_metrics=metrics,
        )
        plan = contest.hold().plan
        with self.progress.step("tightness of the prediction"):
            samples = take_samples(self.batches, TIGHTNESS_SAMPLES)
            held = tightness(self.model, self.layers, samples, profile, plan.widths)
        report = self._report(contest, metrics, profile, held)
        if self.options.study and self.sharing.rank == 0:  # nothing is drawn on the other ranks
            with self.progress.step("studies"):
                report = replace(report, studies=explain(contest, plan, self.batches, self.loss_fn))
        plan.apply(self.model)
        return QuantizationResult(self.model, plan, profile, report)

    def _announce(self) -> Objective:
        """Say what will be done and about how long it will take, judged by the time of one forward pass."""
        start = time.perf_counter()
        objective = make_objective(self.options.objective, self.model, self.batches, self.loss_fn)
        objective.value(self.model)  # a loss that is not finite or no scalar shows here, before any work
        seconds = (time.perf_counter() - start) * (20 + len(self.layers) * (1 + len(self.options.methods)))
        self.progress.say(
            f"{len(self.layers)} layers, {sum(self.sizes.weights):,} weights, {objective.samples} samples, "
            f"{self.options.method} with {self.options.budget}: about {duration(seconds)}, curvature not counted"
        )
        return objective

    def _judge(self, objective: Objective) -> dict[str, float]:
        """Metrics of the network as it is, by name."""
        metrics = {objective.name: objective.value(self.model)}
        if self.evaluate is not None:
            self.sharing.meet("evaluation")  # it may have collectives of its own
            metrics |= {name: float(value) for name, value in self.evaluate(self.model).items()}
        return self.sharing.first(metrics, "metrics")  # what is tried next has to be the same on every rank

    def _check_monitor(self, metrics: Mapping[str, float]) -> None:
        """Refuse to watch a metric that nobody computes, before anything is measured."""
        budget = self.options.budget
        if isinstance(budget, MaxDrop) and budget.monitor not in metrics:
            logged = ", ".join(map(repr, metrics))
            raise BudgetError(
                f"monitor={budget.monitor!r} is not among the metrics of the float network, which are {logged}; "
                "name one of these, or log it in validation."
            )

    def _measure(self) -> CurvatureProfile:
        return measure(
            self.model,
            self.batches,
            layers=self.layers,
            objective=self.options.objective,
            loss_fn=self.loss_fn,
            needs=self.options.needs,
            bits=self.options.bits,
            samples=self.options.curvature_samples,
            eigenpairs=self.options.eigenpairs,
            seed=self.options.seed,
            known=self.known,
            time_budget=self.options.time_budget,
            sharing=self.sharing,
            quantizer=self._quantizer,
            progress=self.progress,
        )

    @property
    def _quantizer(self) -> Quantizer:
        return Quantizer(self.options.quantizer, self.options.range, self.options.symmetry)

    def _chooser(self, profile: CurvatureProfile) -> Chooser:
        samples = take_samples(self.batches, profile.samples)
        objective = make_objective(self.options.objective, self.model, samples, self.loss_fn)
        loss = rounded_loss(self.model, self.layers, objective, self.options.bits, self._quantizer)
        norm = make_reference(self.model, samples).size
        o = self.options
        mixed = self.candidates if o.activation_bits == MIXED else ()
        return Chooser(profile, self.sizes, o.bits, norm, loss, o.seed, o.granularity, mixed)

    def _workshop(self, profile: CurvatureProfile) -> Workshop:
        o, valley = self.options, None
        if o.rounding == "long_axis":
            with self.progress.step("eigenvectors of the Hessian"), self.sharing.agreed("eigenvectors"):
                samples = take_samples(self.batches, profile.samples)
                objective = make_objective(o.objective, self.model, samples, self.loss_fn)
                valley = find_valley(self.model, self.layers, objective, o.eigenpairs, o.seed)
        return open_workshop(self.model, self.layers, self.sizes, o, self.batches, valley)

    def _report(
        self, contest: Contest, metrics: Mapping[str, float], profile: CurvatureProfile, held: Tightness
    ) -> QuantizationReport:
        plans = {variant: attempt.plan for variant, attempt in contest.attempts.items()}
        total = sum(self.sizes.weights) + self.sizes.unquantized
        sizes = {"float": Size(float(FLOAT_BITS), 1.0, total * FLOAT_BITS // 8)}
        sizes |= {variant: Size(plan.avg_bits, plan.ratio, plan.bytes) for variant, plan in plans.items()}
        rows, bits_of = [], {variant: plan.bits for variant, plan in plans.items()}
        inputs_of = {variant: plan.activation_bits for variant, plan in plans.items()}
        for layer in self.layers:
            row, name = profile[layer.name], layer.name
            bits = {variant: bits[name] for variant, bits in bits_of.items()}
            inputs = {variant: bits[name] for variant, bits in inputs_of.items() if name in bits}
            rows.append(LayerRow(name, layer.kind, layer.weights, layer.macs, row.kappa, row.lipschitz, bits, inputs))
        notes = [f"Layer '{x.name}' stays in float32: no calibration batch calls it." for x in self.skipped]
        if profile.sampled is not None:
            drawn, of = profile.sampled
            notes.append(
                f"Curvature rests on {drawn:,} output rows drawn at random of {of:,}: traces and quadratic forms are "
                "unbiased, eigenvalues are estimates."
            )
        if self.options.range == "curvature":
            notes.append("Bits were chosen by rounding errors of grids in whose range all weights count the same.")
        every = {"float": metrics, **contest.metrics}
        return QuantizationReport(
            method=plans["quantized"].method,
            budget=str(self.options.budget),
            layers=tuple(rows),
            sizes=sizes,
            metrics={f"{variant}/{name}": x for variant, found in every.items() for name, x in found.items()},
            predicted_loss={v: x for v, p in plans.items() if (x := profile.predicted_loss(p.widths)) is not None},
            options=self.options.to_dict(),
            versions=versions(),
            seconds=dict(self.progress.seconds),
            notes=(*notes, *contest.notes),
            tightness=held,
        )
