"""The whole road without Lightning: measure → allocate → round → repair → swap → evaluate."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.allocation.knapsack import solve
from lightning_caq.allocation.methods import get_method
from lightning_caq.batches import calibration_batches
from lightning_caq.budget import FLOAT_BITS, LayerSizes, check_budget
from lightning_caq.contexts import Evaluate, InFloat32, curvature_safe
from lightning_caq.errors import LayerError
from lightning_caq.evaluation.report import LayerRow, QuantizationReport, Size
from lightning_caq.evaluation.versions import versions
from lightning_caq.isolation import preserved
from lightning_caq.layers import Layer, find_layers, layer_sizes, layer_weight
from lightning_caq.measures.measure import measure
from lightning_caq.measures.profile import CurvatureProfile
from lightning_caq.objective import Loss, Objective, make_objective
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import LayerPlan, QuantizationPlan, weights_fingerprint
from lightning_caq.progress import Progress, Say, duration, silent
from lightning_caq.quantizers.affine import fit_grid
from lightning_caq.quantizers.repair import Repair, prepare_repair
from lightning_caq.quantizers.rounding import round_layer
from lightning_caq.quantizers.swap import quantized_modules


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


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "cet",
    avg_bits: float | None = None,
    ratio: float | None = None,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    rounding: str = "error_feedback",
    batchnorm: str = "recentre",
    objective: str = "distill",
    calibration_samples: int = 512,
    curvature_samples: int = 256,
    eigenpairs: int = 64,
    loss_fn: Loss | None = None,
    evaluate: Evaluate | None = None,
    profile: CurvatureProfile | None = None,
    compare: Sequence[str] = ("uniform",),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    inplace: bool = True,
    say: Say = silent,
) -> QuantizationResult:
    """Quantize a trained network.

    Args:
        model: The network.
        batches: Re-iterable calibration batches: tensors, tuples whose first item is the input, or dicts.
        method: How bits are allocated, see ``QuantizationOptions``, as for the following ones.
        avg_bits: Budget: average bits a weight.
        ratio: Budget: float32 size over quantized size.
        bits: Candidate bit-widths.
        rounding: ``"error_feedback"`` or ``"nearest"``.
        batchnorm: ``"recentre"`` or ``"keep"``.
        objective: ``"distill"`` or ``"task"``.
        calibration_samples: Samples used to round and to repair.
        curvature_samples: How many of these are used to measure curvature.
        eigenpairs: Eigenpairs that span the short-axis subspace.
        loss_fn: Loss of a model and a batch, for ``objective="task"``.
        evaluate: Metrics of a network, such as its accuracy; called for the float network, the quantized one and each
            compared one. The calibration objective is always reported.
        profile: A profile of an earlier run; what it holds for the same weights and samples is not measured again, so
            that a second budget costs no second measurement.
        compare: Methods to evaluate beside the chosen one.
        include: Shell patterns of the layers to quantize.
        exclude: Shell patterns of the layers to leave in float32.
        seed: Seed of every random number.
        inplace: Whether ``model`` itself is quantized, or a copy.
        say: Called with one line of progress at a time, such as ``print``.

    Returns:
        The network, the plan, the profile and the report.

    Raises:
        OptionError: If an option is not allowed; nothing has then been done.
        CalibrationError: If the batches cannot be used.
        LayerError: If there is nothing to quantize, or weights are not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> batches = [torch.randn(32, 8) for _ in range(4)]
        >>> result = quantize(net, batches, avg_bits=3)
        >>> result.plan.avg_bits <= 3
        True
        >>> type(net[0]).__name__
        'FakeQuantLinear'
    """
    options = QuantizationOptions(
        method=method,
        avg_bits=avg_bits,
        ratio=ratio,
        bits=bits,
        rounding=rounding,
        batchnorm=batchnorm,
        objective=objective,
        calibration_samples=calibration_samples,
        curvature_samples=curvature_samples,
        eigenpairs=eigenpairs,
        compare=compare,
        include=include,
        exclude=exclude,
        seed=seed,
    )
    target = model if inplace else copy.deepcopy(model)
    return run(target, batches, options, loss_fn=loss_fn, evaluate=evaluate, profile=profile, progress=Progress(say))


def run(
    model: nn.Module,
    batches: Iterable[Any],
    options: QuantizationOptions,
    *,
    loss_fn: Loss | None = None,
    evaluate: Evaluate | None = None,
    profile: CurvatureProfile | None = None,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Quantize a network in place, with options that were checked. See ``quantize``.

    If anything fails the network is exactly as it was before.
    """
    progress = progress or Progress()
    if quantized_modules(model):
        raise LayerError(
            f"{type(model).__name__} is quantized already; restore its float weights before quantizing it again."
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
        sizes = layer_sizes(layers, left)
        check_budget(options.budget, sizes, options.bits)
        return _Road(
            model, layers, skipped, sizes, samples, options, loss_fn, float32.outside(evaluate), profile, progress
        ).walk()


@dataclass(frozen=True)
class _Road:
    """The steps of one run over one network, in order."""

    model: nn.Module
    layers: list[Layer]
    skipped: list[Layer]
    sizes: LayerSizes
    batches: list[Any]
    options: QuantizationOptions
    loss_fn: Loss | None
    evaluate: Evaluate | None
    known: CurvatureProfile | None
    progress: Progress

    def walk(self) -> QuantizationResult:
        options, model = self.options, self.model
        objective = self._announce()
        floats = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
        metrics = self._metrics("float", objective)
        profile = self._measure()
        repair = None
        if options.batchnorm == "recentre":
            repair = prepare_repair(model, self.layers, self.batches, options.objective, self.loss_fn)
        notes = [f"Layer '{x.name}' stays in float32: no calibration batch calls it." for x in self.skipped]
        if profile.kept < 0.99:
            notes.append(f"The eigenspace holds {profile.kept:.0%} of the outputs' curvature; energies lack the rest.")
        plans: dict[str, QuantizationPlan] = {}
        for name in options.methods:
            variant = "quantized" if name == options.method else name
            with self.progress.step(f"rounding ({name})"):
                plans[variant], note = self._round(name, self._allocate(name, profile), repair)
            notes += [f"{name}: {note}."] if note else []
            metrics |= self._metrics(variant, objective)
            _write(model, floats)
        plans["quantized"].apply(model)
        return QuantizationResult(model, plans["quantized"], profile, self._report(plans, profile, metrics, notes))

    def _announce(self) -> Objective:
        """Say what will be done and about how long it will take, judged by the time of one forward pass."""
        start = time.perf_counter()
        objective = make_objective(self.options.objective, self.model, self.batches, self.loss_fn)
        objective.value(self.model)  # a loss that is not finite or no scalar shows here, before any work
        seconds = (time.perf_counter() - start) * (20 + len(self.layers) * (1 + len(self.options.methods)))
        self.progress.say(
            f"{len(self.layers)} layers, {sum(self.sizes.weights):,} weights, {objective.samples} samples, "
            f"{self.options.method} with {self.options.budget}: about {duration(seconds)}"
        )
        return objective

    def _measure(self) -> CurvatureProfile:
        needs = frozenset({"kappa", "lipschitz", "inputs"})
        return measure(
            self.model,
            self.batches,
            layers=self.layers,
            objective=self.options.objective,
            loss_fn=self.loss_fn,
            needs=needs.union(*(get_method(name).needs for name in self.options.methods)),
            bits=self.options.bits,
            samples=self.options.curvature_samples,
            eigenpairs=self.options.eigenpairs,
            seed=self.options.seed,
            known=self.known,
            progress=self.progress,
        )

    def _allocate(self, method: str, profile: CurvatureProfile) -> tuple[int, ...]:
        costs = get_method(method).costs(profile, self.options.bits)
        return solve(costs, self.sizes.weights, self.options.bits, self.options.budget.limit(self.sizes)).bits

    def _round(self, method: str, bits: Sequence[int], repair: Repair | None) -> tuple[QuantizationPlan, str]:
        """Write the rounded weights into the network, layer by layer, and repair what that moved."""
        made_for = weights_fingerprint(self.model, [layer.name for layer in self.layers])
        plans = []
        for layer, b in zip(self.layers, bits, strict=True):
            weight = layer_weight(self.model, layer)
            grid = fit_grid(weight, b, layer.channel_shape)
            codes = round_layer(self.model, layer, grid, self.options.rounding, self.batches)
            with torch.no_grad():
                weight.copy_(grid.values(codes))
            plans.append(LayerPlan(layer.name, layer.modules, grid, codes))
        repairs, note = repair(self.model) if repair is not None else ({}, "")
        budget, rounding = str(self.options.budget), self.options.rounding
        return QuantizationPlan(method, budget, rounding, tuple(plans), self.sizes, made_for, repairs).cpu(), note

    def _metrics(self, variant: str, objective: Objective) -> dict[str, float]:
        with self.progress.step(f"evaluation ({variant})"):
            metrics = {objective.name: objective.value(self.model)}
            if self.evaluate is not None:
                metrics |= {name: float(value) for name, value in self.evaluate(self.model).items()}
        return {f"{variant}/{name}": value for name, value in metrics.items()}

    def _report(
        self,
        plans: Mapping[str, QuantizationPlan],
        profile: CurvatureProfile,
        metrics: Mapping[str, float],
        notes: Sequence[str],
    ) -> QuantizationReport:
        total = sum(self.sizes.weights) + self.sizes.unquantized
        sizes = {"float": Size(float(FLOAT_BITS), 1.0, total * FLOAT_BITS // 8)}
        sizes |= {variant: Size(plan.avg_bits, plan.ratio, plan.bytes) for variant, plan in plans.items()}
        rows = []
        for layer in self.layers:
            row, bits = profile[layer.name], {variant: plan.bits[layer.name] for variant, plan in plans.items()}
            rows.append(LayerRow(layer.name, layer.kind, layer.weights, layer.macs, row.kappa, row.lipschitz, bits))
        return QuantizationReport(
            method=self.options.method,
            budget=str(self.options.budget),
            layers=tuple(rows),
            sizes=sizes,
            metrics=dict(metrics),
            predicted_loss={v: x for v, p in plans.items() if (x := profile.predicted_loss(p.bits)) is not None},
            options={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()},
            versions=versions(),
            seconds=dict(self.progress.seconds),
            notes=tuple(notes),
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters and buffers by state-dict key; extra state that is no tensor is left out."""
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}


def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    live = _tensors(model)
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
