"""A whole run without Lightning: prepare, measure, allocate and round, select, evaluate, report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_caq.allocation.budget import MaxDrop, check_budget, check_coded_budget
from lightning_caq.allocation.choose import Chooser
from lightning_caq.allocation.mixed import MIXED, input_candidates
from lightning_caq.errors import BudgetError, LayerError
from lightning_caq.evaluation.explain_run import explain
from lightning_caq.evaluation.grid_cost import restriction_cost
from lightning_caq.evaluation.rate_limit import plan_limit
from lightning_caq.evaluation.run_report import run_report
from lightning_caq.evaluation.same_metrics import WatchedEvaluation, same_metrics_note
from lightning_caq.evaluation.tightness import tightness
from lightning_caq.measures.cost import multiplication_seconds
from lightning_caq.measures.hessian.eigenvectors import check_memory
from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounded_loss import rounded_loss
from lightning_caq.network.batches import take_samples
from lightning_caq.network.deployed import find_deployed, stored_widths
from lightning_caq.network.drawn import drawn
from lightning_caq.network.float_notes import baked_notes, float_notes
from lightning_caq.network.float_outputs import Reference, make_reference
from lightning_caq.network.forward import Batch
from lightning_caq.network.layers import Layer, chosen_layers, find_layers
from lightning_caq.network.objective import Loss, Objective, objective_from
from lightning_caq.network.parts.expand import every_weight_a_layer, expand_uses
from lightning_caq.network.prepare import prepare
from lightning_caq.notes import Note
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.groups import check_scale_type, group_counts, layer_group_size
from lightning_caq.quantizers.rounding.cost import rounding_seconds
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.reporting.html import write_html
from lightning_caq.scores import Score, as_scores
from lightning_caq.selection.candidate import CandidateMaker, prepare_candidates
from lightning_caq.selection.long_axis import prepare_long_axis
from lightning_caq.selection.select import Selection, Selector
from lightning_caq.selection.steps import StepSearch
from lightning_caq.sizes import SCALE_BITS, STEPPED, LayerSizes
from lightning_caq.studies import RateLimit, Studies, Tightness
from lightning_caq.utilities.contexts import Evaluate, InFloat32, curvature_safe
from lightning_caq.utilities.cores import CpuTimes, crowded, free_cores
from lightning_caq.utilities.isolation import preserved
from lightning_caq.utilities.keywords import known_keywords, takes_fields_of
from lightning_caq.utilities.metric_names import Direction, direction_of_name
from lightning_caq.utilities.progress import Progress, Say, silent
from lightning_caq.utilities.sharing import ALONE, Sharing

TIGHTNESS_SAMPLES = 32
_CANDIDATE_PASSES, _TIGHTNESS_PASSES, _STUDY_PASSES = (
    6,
    40,
    60,
)  # forward passes: over all samples, and over those of tightness
_STEP_SEARCH = 8  # roundings of a search for steps, most of them on few samples


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
        batches: Re-iterable calibration batches: tensors, tuples whose first item is the input, or dicts. Of a data set
            with indices, or a plain loader of one, ``calibration_samples`` items are drawn by ``seed``; of all else the
            first are taken, whatever the seed.
        options: Every field of QuantizationOptions.
        loss_fn: Loss of a model and a batch, for ``objective="task"``.
        evaluate: Metrics of a network by name, such as its accuracy; called for the float network, the quantized one
            and each compared one. A metric is a number, or a tensor with one number for each sample, whose mean it is:
            then standard errors are known, and differences are judged sample by sample. The calibration objective is
            always reported.
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
    batches = drawn(batches, chosen.calibration_samples, chosen.seed)
    return run(target, batches, chosen, loss_fn=loss_fn, evaluate=evaluate, profile=profile, progress=Progress(say))


def run(
    model: nn.Module,
    batches: Iterable[Any],
    options: QuantizationOptions,
    *,
    loss_fn: Loss | None = None,
    training_loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    profile: CurvatureProfile | None = None,
    direction: Callable[[str], Direction | None] = direction_of_name,
    progress: Progress | None = None,
    sharing: Sharing = ALONE,
) -> QuantizationResult:
    """Quantize a network in place, with options that were checked. See ``quantize``.

    ``training_loss`` is a loss that is not the objective, but tells how the module is run and what its outputs mean.
    ``direction`` says whether more or less of a metric is better, where ``monitor_mode`` leaves that open. If anything
    fails the network is exactly as it was before. Processes that hold the same network and the same batches may divide
    the work of measuring by ``sharing``.
    """
    progress = progress or Progress()
    if quantized_modules(model):
        raise LayerError(
            f"{type(model).__name__} is quantized already; build it anew, with its float weights, to quantize it again."
        )
    device = next((p.device for p in model.parameters()), None)
    with _measurable(model, options) as (float32, widths):
        samples = prepare(
            model,
            batches,
            options.calibration_samples,
            use=options.use,
            loss=loss_fn or training_loss,
            task=options.objective == "task",
            device=device,
            convert=float32.batch,
        )
        expand_uses(model, samples[0])
        validation = WatchedEvaluation(float32.outside(evaluate)) if evaluate is not None else None
        steps = _Steps(options, loss_fn, validation, sharing, progress)
        network = steps.prepare(model, samples, widths)
        float_metrics = steps.judge_float(network)
        steps = replace(steps, options=options.directed(direction))
        profile = steps.measure(network, known=profile)
        chooser, maker = steps.allocator(network, profile), steps.maker(network, profile)
        selection = steps.select(network, chooser, maker, float_metrics)
        evaluation = steps.evaluate(network, chooser, maker, selection)
        progress.close()
        report = steps.report(network, profile, selection, evaluation, float_metrics)
        selection.chosen.plan.write(model)
        return QuantizationResult(model, selection.chosen.plan, profile, report)


@contextmanager
def _measurable(model: nn.Module, options: QuantizationOptions) -> Iterator[tuple[InFloat32, Mapping[int, int]]]:
    """While open, the network can be measured; also what its weights take in memory. A failure leaves it as it was."""
    with every_weight_a_layer(model):
        chosen_layers(model, options.include, options.exclude)  # refuses what has none, and weights that are not finite
        widths = stored_widths(model)
        # A data loader draws from the global random state as it is read, so that belongs to what is preserved.
        with curvature_safe(model), preserved(model), InFloat32(model) as float32:
            yield float32, widths


_CHECKED_SAMPLES = 2
# They do nothing to a network that the other measures do not do, and take long.
_UNCHECKED = frozenset(
    {"kappa", "kappa_mean", "lipschitz", "local_lipschitz", "scale_importance", "density", "loss_change"}
)


def check(
    model: nn.Module,
    batch: Any,
    options: QuantizationOptions,
    *,
    loss_fn: Loss | None = None,
    training_loss: Loss | None = None,
    progress: Progress | None = None,
) -> None:
    """Run one batch through everything that could refuse a network; it is left as it was.

    Args:
        model: The network, not trained as yet.
        batch: A batch of its training data.
        options: What is going to be done.
        loss_fn: Loss of the network and a batch, for ``objective="task"``.
        training_loss: A loss that only tells how the module is run and what its outputs mean.
        progress: Where to say what was found out about the network.

    Raises:
        OptionError: If an option does not go with the network.
        CalibrationError: If the network cannot be run on the batch, or its outputs or losses cannot be used.
        LayerError: If there is nothing to quantize.
        BudgetError: If the budget cannot be met.
    """
    device = next((p.device for p in model.parameters()), None)
    with _measurable(model, options) as (float32, widths):
        samples = prepare(
            model,
            [batch],
            options.calibration_samples,
            use=options.use,
            loss=loss_fn or training_loss,
            task=options.objective == "task",
            device=device,
            convert=float32.batch,
        )
        expand_uses(model, samples[0])
        steps = _Steps(options, loss_fn, None, ALONE, Progress())
        network = steps.prepare(model, take_samples(samples, _CHECKED_SAMPLES), widths)
        for note in network.notes:
            if progress is not None and note.severity != "warning":  # those are brought by the run itself
                progress.tell(note)
        measure(
            model,
            network.reference.batches,
            layers=network.layers,
            objective=options.objective,
            loss_fn=loss_fn,
            needs=options.needs - _UNCHECKED,
            bits=options.bits[-1:],
            eigenpairs=1,
            seed=options.seed,
        )


@dataclass(frozen=True)
class _Network:
    """A float network and what is known of it before anything is measured.

    Attributes:
        model: The network.
        layers: The layers to quantize.
        notes: What the user was told of how the network is run, and of weights that are not quantized.
        sizes: Sizes of the layers.
        input_bits: Candidate bits of each layer's input, a row a layer.
        reference: The calibration samples and the network's outputs on them.
        objective: The calibration objective on the same samples.
        loss: Its value, nat, with what it rests on.
        forward: Seconds of a forward pass over all samples.
        clocks: Processor times before it was run.
    """

    model: nn.Module
    layers: Sequence[Layer]
    notes: Sequence[Note]
    sizes: LayerSizes
    input_bits: Sequence[Sequence[int]]
    reference: Reference
    objective: Objective
    loss: Score
    forward: float
    clocks: CpuTimes | None

    def on(self, samples: int) -> tuple[Objective, Reference]:
        """Objective and outputs on the first samples."""
        first = take_samples(self.reference.batches, samples)
        return self.objective.on(self.model, first), self.reference.on(self.model, first)


def _ungrouped_note(layers: Sequence[Layer], options: QuantizationOptions) -> tuple[Note, ...]:
    """What is said of layers that have one scale a channel though groups were asked for."""
    names = [repr(x.name) for x in layers if options.group_size and layer_group_size(x, options.group_size) is None]
    if not names:
        return ()
    return (Note(f"Transposed convolutions keep one scale a channel, whatever group_size is: {', '.join(names)}."),)


@dataclass(frozen=True)
class _Evaluation:
    """What is found out about the network that was selected, with the float one at hand."""

    tightness: Tightness | None
    studies: Studies
    limit: RateLimit | None = None


@dataclass(frozen=True)
class _Steps:
    """The steps of a run, in order; what they share does not change."""

    options: QuantizationOptions
    loss_fn: Loss | None
    validation: WatchedEvaluation | None
    sharing: Sharing
    progress: Progress

    def prepare(self, model: nn.Module, samples: Sequence[Batch], widths: Mapping[int, int]) -> _Network:
        """Find the layers, refuse a budget that cannot be met, and run the float network."""
        options = self.options
        asked = find_layers(model, *samples, include=options.include, exclude=options.exclude)
        deployed = find_deployed(model, asked, samples, patterns=options.deployed, widths=widths)
        layers = deployed.layers
        notes = (
            *map(Note, samples[0].forward.notes),
            *float_notes(deployed),
            *baked_notes(model, layers),
            *_ungrouped_note(layers, options),
        )
        if not layers:
            raise LayerError(
                "No calibration batch calls any of the layers to quantize; check the batches, include or deployed."
            )
        for note in notes:
            self.progress.tell(note)
        check_scale_type(model, layers, options.scale_dtype, max(options.bits))
        sizes = replace(
            deployed.sizes,
            quantizer=STEPPED if options.coding == "entropy" else options.quantizer,
            groups=group_counts(layers, options.group_size),
            scale_bits=SCALE_BITS[options.scale_dtype],
        )
        input_bits = input_candidates(len(layers), options.bits, options.activation_bits)
        sizes, most = (replace(sizes, activation_bits=tuple(row[i] for row in input_bits)) for i in (0, -1))
        if options.coding == "fixed":
            check_budget(options.budget, sizes, options.bits, most)
        else:
            check_coded_budget(options.budget, sizes)
        if options.rounding == "long_axis":
            check_memory(layers, options.eigenpairs)
        start, clocks = time.perf_counter(), CpuTimes.now()
        reference = make_reference(model, samples)
        objective = objective_from(options.objective, reference, self.loss_fn)
        loss = objective.score(model)  # one that is not finite or no scalar shows here, before any work
        forward = (time.perf_counter() - start) / 2
        self.progress.headline = (
            f"{len(layers)} layers, {sum(sizes.weights):,} weights, {objective.samples} samples, {options.method} with "
            f"{options.budget}; "
        )
        return _Network(
            model=model,
            layers=layers,
            notes=notes,
            sizes=sizes,
            input_bits=input_bits,
            reference=reference,
            objective=objective,
            loss=loss,
            forward=forward,
            clocks=clocks,
        )

    def _expect(self, network: _Network, validation: float) -> None:
        """Count on all that follows measuring.

        Args:
            network: The float network, with the time that a forward pass over all samples takes.
            validation: Seconds that evaluating it took.
        """
        options, samples, forward = self.options, network.objective.samples, network.forward
        rounding = _CANDIDATE_PASSES * forward
        if options.rounding == "error_feedback":
            rounding += rounding_seconds(network.layers, samples, multiplication_seconds())
        if options.coding == "entropy":
            rounding *= _STEP_SEARCH
        guard = options.guard and "uniform" not in options.methods
        tries = options.max_evaluations if isinstance(options.budget, MaxDrop) else 1
        count = len(options.methods) - 1 + guard + tries
        self.progress.expect(f"{count} networks", rounding, times=count, steps=("rounding",))
        self.progress.expect("their validation", validation + forward, times=count, steps=("evaluation",))
        if options.coding == "fixed":
            passes = _TIGHTNESS_PASSES * min(TIGHTNESS_SAMPLES / samples, 1.0)
            self.progress.expect(
                "comparison with predictions", passes * forward, steps=("tightness of the prediction",)
            )
        if options.study:
            self.progress.expect("studies", rounding + _STUDY_PASSES * forward)
        if told := crowded(torch.get_num_threads(), free_cores(network.clocks, CpuTimes.now())):
            self.progress.say(told)

    def judge_float(self, network: _Network) -> dict[str, Score]:
        """Metrics of the float network; refuses to watch one that nobody computes, before anything is measured."""
        start = time.perf_counter()
        with self.progress.step("evaluation (float)"):
            metrics = self._metrics(network, network.loss)
        self._expect(network, time.perf_counter() - start)
        budget = self.options.budget
        if isinstance(budget, MaxDrop) and budget.monitor not in metrics:
            logged = ", ".join(map(repr, metrics))
            raise BudgetError(
                f"monitor={budget.monitor!r} is not among the metrics of the float network, which are {logged}; "
                "name one of these, or log it in validation."
            )
        return metrics

    def measure(self, network: _Network, known: CurvatureProfile | None) -> CurvatureProfile:
        """Measure the float network, unless an earlier profile holds all that is needed."""
        return measure(
            network.model,
            network.reference.batches,
            layers=network.layers,
            objective=self.options.objective,
            loss_fn=self.loss_fn,
            needs=self.options.needs,
            bits=self.options.bits,
            quantizer=self.options.values,
            samples=self.options.curvature_samples,
            eigenpairs=self.options.eigenpairs,
            seed=self.options.seed,
            known=known,
            time_budget=self.options.time_budget,
            sharing=self.sharing,
            progress=self.progress,
        )

    def allocator(self, network: _Network, profile: CurvatureProfile) -> Chooser:
        """What allocates bits by the profile."""
        objective, reference = network.on(profile.samples)
        return Chooser(
            profile=profile,
            sizes=network.sizes,
            bits=self.options.bits,
            output_norm=reference.size,
            evaluate=rounded_loss(network.model, network.layers, objective, self.options.bits, self.options.values),
            seed=self.options.seed,
            granularity=self.options.granularity,
            inputs=network.input_bits if self.options.activation_bits == MIXED else (),
        )

    def maker(self, network: _Network, profile: CurvatureProfile) -> CandidateMaker:
        """What makes candidate networks by an allocation."""
        model, layers, options, long_axis = network.model, network.layers, self.options, None
        if options.rounding == "long_axis":
            with self.progress.step("eigenvectors of the Hessian"), self.sharing.agreed("eigenvectors"):
                objective, _ = network.on(profile.samples)
                long_axis = prepare_long_axis(
                    model, layers, objective, eigenpairs=options.eigenpairs, seed=options.seed
                )
        return prepare_candidates(model, layers, network.sizes, options, network.reference, long_axis)

    def select(
        self, network: _Network, chooser: Chooser, maker: CandidateMaker, float_metrics: Mapping[str, Score]
    ) -> Selection:
        """Make the networks that were asked for, and choose the one to keep."""
        return Selector(
            chooser=chooser,
            maker=maker,
            judge=lambda: self._metrics(network, network.objective.score(network.model)),
            options=self.options,
            progress=self.progress,
            float_metrics=float_metrics,
            steps=StepSearch(maker, chooser.profile, self.options.bits) if self.options.coding == "entropy" else None,
        ).select()

    def evaluate(self, network: _Network, chooser: Chooser, maker: CandidateMaker, selection: Selection) -> _Evaluation:
        """Compare what was predicted with what is observed."""
        plan, studies = selection.chosen.plan, Studies()
        if not plan.widths:
            return _Evaluation(None, studies, plan_limit(network.model, plan, selection.tried))
        with self.progress.step("tightness of the prediction"):
            _, reference = network.on(TIGHTNESS_SAMPLES)
            errors = tightness(network.model, network.layers, reference, chooser.profile, plan.widths)
        if self.options.study and self.sharing.rank == 0:  # nothing is drawn on the other ranks
            with self.progress.step("studies"):
                objective, reference = network.objective, network.reference
                studies = explain(maker, chooser, objective=objective, reference=reference, plan=plan)
        return _Evaluation(errors, studies)

    def report(
        self,
        network: _Network,
        profile: CurvatureProfile,
        selection: Selection,
        evaluation: _Evaluation,
        float_metrics: Mapping[str, Score],
    ) -> QuantizationReport:
        """Put together what was done, what it cost and what it gave."""
        return run_report(
            self.options,
            network.layers,
            network.sizes,
            profile=profile,
            selection=selection,
            float_metrics=float_metrics,
            tightness=evaluation.tightness,
            studies=evaluation.studies,
            limit=evaluation.limit,
            seconds=self.progress.seconds,
            notes=self._notes(network, float_metrics, selection),
        )

    def _notes(self, network: _Network, float_metrics: Mapping[str, Score], selection: Selection) -> list[Note]:
        """What the user was told before anything was measured, and what is left to say."""
        bypasses = self.validation is not None and self.validation.bypasses
        metrics, objective = selection.chosen.metrics, network.objective.name
        notes = [*same_metrics_note(float_metrics, metrics, leave=objective, bypasses=bypasses)]
        if self.options.range == "curvature":
            notes.append(
                Note("Bits were chosen by rounding errors of grids in whose range all weights count the same.")
            )
        plan = selection.chosen.plan
        if self.options.runtime != "any" and plan.widths:
            own, widths = self.options.values, list(plan.widths.values())
            free = replace(own, symmetry=self.options.symmetry)
            more = restriction_cost(network.model, network.layers, widths, restricted=own, free=free)
            notes.append(
                Note(
                    f"Grids of weights are those that {self.options.runtime} executes fast; the squared error of "
                    f"rounding to the nearest values is {more:.3g} times that of free grids."
                )
            )
        for note in notes:
            self.progress.tell(note)
        return [*network.notes, *notes]

    def _metrics(self, network: _Network, loss: Score) -> dict[str, Score]:
        """Metrics of the network as it is, by name; ``loss`` is its calibration objective."""
        metrics = {network.objective.name: loss}
        if self.validation is not None:
            self.sharing.meet("evaluation")  # it may have collectives of its own
            metrics |= as_scores(self.validation(network.model))
        return self.sharing.first(metrics, "metrics")  # what is tried next has to be the same on every rank
