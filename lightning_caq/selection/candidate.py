"""Candidates: one allocation carried out on the network, judged, and taken back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.allocation.choose import Choice
from lightning_caq.allocation.steps import StepChoice
from lightning_caq.network.batches import HELD_OUT, batch_size, split_samples
from lightning_caq.network.float_outputs import Reference
from lightning_caq.network.layers import Layer, layer_weight
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import LayerPlan, QuantizationPlan, coded, weights_fingerprint
from lightning_caq.quantizers.calibration import calibrate_inputs, rounded_inputs
from lightning_caq.quantizers.fake_quant.swap import restore_modules
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.grids.values import Quantizer
from lightning_caq.quantizers.packing.coded import encode_weights
from lightning_caq.quantizers.repair import Repair, prepare_repair
from lightning_caq.quantizers.rounding.moments import samples_needed
from lightning_caq.quantizers.rounding.passes import PairedPasses
from lightning_caq.quantizers.rounding.round_layer import round_layer
from lightning_caq.quantizers.rounding.round_steps import StepRounding
from lightning_caq.scores import Score
from lightning_caq.selection.long_axis import LongAxisRounding
from lightning_caq.sizes import LayerSizes, width_bits

Rounded = tuple[list[LayerPlan], dict[str, InputGrid]]
"""Weights and grids of inputs, by layer name, those of inputs that stay in float32 missing."""


@dataclass(frozen=True)
class Candidate:
    """An allocation that was carried out.

    Attributes:
        plan: What was done to the network.
        choice: The bits, or the steps, that it was made with.
        error: The output error on the samples that nothing was fitted to, a part of the output.
        dropped: What was seen of a repair that was dropped; empty as a rule.
        metrics: Metrics of the network by name; empty where it was not evaluated.
        distances: ‖F_q(x) − F(x)‖ of each of these samples.
    """

    plan: QuantizationPlan
    choice: Choice | StepChoice
    error: float
    dropped: str = ""
    metrics: Mapping[str, Score] = field(default_factory=dict)
    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class CandidateMaker:
    """Makes candidates of one network, which is the float network before and after.

    Attributes:
        model: The network.
        layers: Its layers.
        sizes: Their sizes.
        rounding: How weights are rounded.
        quantizer: How the values are chosen that they may take.
        fitted: The samples that rounding and repair are fitted to.
        held_out: The float network's outputs on other samples.
        repair: What to repair after rounding, if anything.
        floats: Every tensor of the float network by its state-dict key.
        long_axis: For long-axis rounding, the steep directions to keep out of.
        steps: How weights are rounded to multiples of a step.
    """

    model: nn.Module
    layers: Sequence[Layer]
    sizes: LayerSizes
    rounding: str
    quantizer: Quantizer
    fitted: Sequence[Any]
    held_out: Reference
    repair: Repair | None
    floats: Mapping[str, Tensor]
    long_axis: LongAxisRounding | None = None
    steps: StepRounding = field(default_factory=StepRounding)

    @property
    def shortage(self) -> str:
        """What is to be said if error feedback has not half the samples of full rank; empty if there are enough.

        With more than half, damping was seen to make up for the rest: a warning would be noise.
        """
        samples = sum(map(batch_size, self.fitted))
        needed = samples_needed(self.model, self.layers, 2 * samples) if self.rounding == "error_feedback" else {}
        if not needed:
            return ""
        listed = ", ".join(f"'{name}' ({count:,})" for name, count in needed.items())
        return (
            f"Error feedback is fitted to {samples:,} samples, not half of what a curvature of full rank takes at the "
            f"input of {listed}; damping makes up for what is missing. calibration_samples="
            f"{math.ceil(max(needed.values()) / (1 - HELD_OUT))} are enough, those held out included"
        )

    @contextmanager
    def made(self, method: str, budget: str, choice: Choice | StepChoice) -> Iterator[Candidate]:
        """Round the weights and repair what that moved; while open, the network is the candidate.

        Args:
            method: The method that made the choice, for the plan.
            budget: Its budget in words, for the plan.
            choice: Bits, or steps, of every layer.
        """
        try:
            yield self._make(method, budget, choice)
        finally:
            self._restore()

    def try_steps(self, choice: StepChoice) -> tuple[int, float]:
        """Bytes of the codes that steps come to, and the output error on the samples held out, before any repair."""
        try:
            plans, inputs = self._round_to_steps(choice)
            with rounded_inputs(self.model, self.layers, inputs):
                error = self.held_out.error(self.model)
        finally:
            self._restore()
        grids = [plan.grid for plan in plans]
        transposed = [grid.transposed for grid in grids if isinstance(grid, SteppedGrid)]
        return len(encode_weights([plan.codes for plan in plans], transposed)), error

    def _make(self, method: str, budget: str, choice: Choice | StepChoice) -> Candidate:
        made_for = weights_fingerprint(self.model, [layer.name for layer in self.layers])
        plans, inputs = self._rounded(choice)
        with rounded_inputs(self.model, self.layers, inputs):
            repairs, dropped = self.repair(self.model) if self.repair is not None else ({}, "")
        widths = sum(map(width_bits, choice.bits)) if isinstance(choice, Choice) else 0
        plan = QuantizationPlan(
            method=method,
            budget=budget,
            rounding=self.rounding,
            layers=tuple(replace(plan, input_grid=inputs.get(plan.name)) for plan in plans),
            sizes=replace(self.sizes, activation_bits=choice.inputs, widths=widths),
            fingerprint=made_for,
            repairs=repairs,
        ).cpu()
        plan.write(self.model)  # what is judged is what the plan makes of the network
        distances = self.held_out.distances(self.model)
        return Candidate(
            plan,
            choice,
            self.held_out.relative(distances),
            dropped=dropped,
            distances=tuple(distances.tolist()),
        )

    def _rounded(self, choice: Choice | StepChoice) -> Rounded:
        if isinstance(choice, StepChoice):
            plans, inputs = self._round_to_steps(choice)
            return list(coded(plans)), inputs
        return self._round(choice) if self.long_axis is None else self._round_together(choice, self.long_axis)

    def _round_to_steps(self, choice: StepChoice) -> Rounded:
        """One layer after the other, to multiples of steps; what bits they take is left open."""
        plans = []
        with PairedPasses(self.model, self.layers, self.fitted, self.floats) as passes:
            for index, (layer, step) in enumerate(zip(self.layers, choice.steps, strict=True)):
                if choice.inputs:
                    passes.round_inputs(layer, choice.inputs[index])
                grid, codes, distortion = self.steps.round(self.model, layer, step, passes)
                with torch.no_grad():
                    layer_weight(self.model, layer).copy_(grid.values(codes))
                plans.append(LayerPlan(layer.name, layer.modules, grid, codes, distortion=distortion))
        return plans, passes.inputs

    def _round(self, choice: Choice) -> Rounded:
        """One layer after the other, each for the inputs that the rounded layers before it produce."""
        plans = []
        with PairedPasses(self.model, self.layers, self.fitted, self.floats) as passes:
            for index, (layer, b) in enumerate(zip(self.layers, choice.bits, strict=True)):
                if choice.inputs:
                    passes.round_inputs(layer, choice.inputs[index])
                grid, codes = round_layer(self.model, layer, b, self.rounding, passes, self.quantizer)
                with torch.no_grad():
                    layer_weight(self.model, layer).copy_(grid.values(codes))
                plans.append(LayerPlan(layer.name, layer.modules, grid, codes))
        return plans, passes.inputs

    def _round_together(self, choice: Choice, long_axis: LongAxisRounding) -> Rounded:
        """All layers at once, on the grids of nearest rounding."""
        grids = []
        with PairedPasses(self.model, self.layers, self.fitted, self.floats) as passes:
            for layer, b in zip(self.layers, choice.bits, strict=True):
                grid, _ = round_layer(self.model, layer, b, "nearest", passes, self.quantizer)
                assert isinstance(grid, Grid)
                grids.append(grid)
        codes = long_axis.codes(self.model, self.layers, grids)
        plans = [LayerPlan(x.name, x.modules, g, c) for x, g, c in zip(self.layers, grids, codes, strict=True)]
        with torch.no_grad():
            for layer, plan in zip(self.layers, plans, strict=True):
                layer_weight(self.model, layer).copy_(plan.values)
        inputs = calibrate_inputs(self.model, self.layers, self.fitted, choice.inputs) if choice.inputs else {}
        return plans, inputs

    def _restore(self) -> None:
        """Make the network the float one again."""
        restore_modules(self.model)
        live = tensors(self.model)
        with torch.no_grad():
            for name, value in self.floats.items():
                live[name].copy_(value)


def prepare_candidates(
    model: nn.Module,
    layers: Sequence[Layer],
    sizes: LayerSizes,
    options: QuantizationOptions,
    reference: Reference,
    long_axis: LongAxisRounding | None = None,
) -> CandidateMaker:
    """Prepare to make candidates of a float network; the last eighth of the samples is held out to judge them by.

    Args:
        model: The float network, in eval mode.
        layers: Its layers.
        sizes: Their sizes.
        options: Says how to round and to repair.
        reference: The calibration samples, and the float network's outputs on them.
        long_axis: For ``rounding="long_axis"``, from ``prepare_long_axis``.
    """
    fitted, others = split_samples(reference.batches)
    held_out = reference.on(model, others)
    return CandidateMaker(
        model=model,
        layers=layers,
        sizes=sizes,
        rounding=options.rounding,
        quantizer=replace(options.values, keep_zeros=options.zeros_kept),
        fitted=fitted,
        held_out=held_out,
        repair=prepare_repair(model, layers, fitted, held_out) if options.batchnorm == "recentre" else None,
        floats={name: tensor.detach().clone() for name, tensor in tensors(model).items()},
        long_axis=long_axis,
        steps=StepRounding(looks=options.rounding == "error_feedback"),
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live parameters and buffers by state-dict key; extra state that is no tensor is left out."""
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
