"""The contest: the networks that a run makes, one a method, and which of them wins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_caq.allocation.budget import AvgBits, Budget, ErrorBudget, MaxDrop
from lightning_caq.allocation.choose import Choice, Chooser
from lightning_caq.allocation.solver.bisection import smallest_passing
from lightning_caq.errors import BudgetError
from lightning_caq.options import QuantizationOptions
from lightning_caq.selection.candidate import Attempt, Workshop
from lightning_caq.utilities.progress import Progress

CHOSEN, GUARD = "quantized", "uniform"


@dataclass
class Contest:
    """Makes networks, judges each, and puts the float network back.

    Attributes:
        chooser: Allocates bits.
        workshop: Rounds and repairs.
        judge: Metrics of the network as it is, by name.
        options: What the user chose.
        progress: Where to say what is being done.
        float_metrics: Metrics of the float network.
        attempts: The networks that were made, by variant: ``"quantized"`` and each compared method.
        metrics: Their metrics, by variant and name.
        notes: What the reader of the report should know.
    """

    chooser: Chooser
    workshop: Workshop
    judge: Callable[[], dict[str, float]]
    options: QuantizationOptions
    progress: Progress
    float_metrics: Mapping[str, float]
    attempts: dict[str, Attempt] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def hold(self) -> Attempt:
        """Make the network of the chosen method and all it is compared with; returns the one to keep."""
        method, budget = self.options.method, self.options.budget
        if shortage := self.workshop.shortage:
            self.notes.append(f"{shortage}.")
            warnings.warn(f"caq: {shortage}.", stacklevel=2)
        if isinstance(budget, MaxDrop):
            self._within_drop(budget)
        else:
            self._make(CHOSEN, method, budget)
        if isinstance(budget, (MaxDrop, ErrorBudget)):
            budget = AvgBits(self.attempts[CHOSEN].plan.avg_bits)  # all others get the size that this one came to
        for name in dict.fromkeys(self.options.compare):
            if name != method:
                self._make(name, name, budget)
        if self.options.guard:
            self._guard(budget)
        return self.attempts[CHOSEN]

    def _make(self, variant: str, method: str, budget: Budget) -> None:
        """Allocate, round and judge; the network is float again afterwards."""
        with self.progress.step(f"allocation ({method})"):
            choice = self.chooser.choose(method, budget)
        with self.progress.step(f"rounding ({method})"):
            attempt = self.workshop.attempt(method, str(budget), choice)
        with self.progress.step(f"evaluation ({method})"):
            self.metrics[variant] = self.judge()
        self.workshop.restore()
        self.attempts[variant] = attempt
        self.notes += [f"{method}: {note}." for note in attempt.notes]

    def _within_drop(self, budget: MaxDrop) -> None:
        """The smallest network that loses no more of a metric than allowed, by bisection over the average bits."""
        made: dict[Choice, tuple[float, Attempt, dict[str, float]]] = {}

        def passes(avg_bits: float) -> bool:
            choice = self.chooser.choose(self.options.method, AvgBits(avg_bits))
            if choice not in made:
                self._make(CHOSEN, self.options.method, AvgBits(avg_bits))
                metrics = self.metrics[CHOSEN]
                drop = self._drop(metrics, budget)
                self.progress.say(f"{avg_bits:.3f} bits on average: {budget.monitor} drops by {drop:.4g}")
                made[choice] = drop, self.attempts[CHOSEN], metrics
            return made[choice][0] <= budget.value

        low, high = min(self.options.bits), max(self.options.bits)
        if smallest_passing(passes, low, high, self.options.max_evaluations) is None:
            least = min(drop for drop, _, _ in made.values())
            raise BudgetError(
                f"{budget} cannot be met: even with every layer at {high} bits {budget.monitor} drops by {least:.4g}; "
                "allow a larger drop or add larger bit-widths."
            )
        good = [found for found in made.values() if found[0] <= budget.value]
        self.notes.append(f"{budget}: {len(made)} networks were tried; more max_evaluations search more finely.")
        _, self.attempts[CHOSEN], self.metrics[CHOSEN] = min(good, key=lambda found: found[1].plan.avg_bits)

    def _drop(self, metrics: Mapping[str, float], budget: MaxDrop) -> float:
        """By how much a network's metric is worse than the float network's."""
        sign = 1 if self.options.monitor_mode == "max" else -1
        return sign * (self.float_metrics[budget.monitor] - metrics[budget.monitor])

    def _guard_meets(self, budget: Budget) -> bool:
        """Whether uniform bits keep a budget that their size says nothing about."""
        if isinstance(budget, MaxDrop):
            return self._drop(self.metrics[GUARD], budget) <= budget.value
        bits = tuple(self.attempts[GUARD].plan.widths.values())
        return not isinstance(budget, ErrorBudget) or self.chooser.keeps(self.options.method, budget, bits)

    def _guard(self, budget: Budget) -> None:
        """Keep uniform bits instead, if they are better on the samples held out and within what was asked for."""
        method, chosen = self.options.method, self.attempts[CHOSEN]
        made_of = Choice(tuple(chosen.plan.widths.values()), chosen.plan.sizes.activation_bits)
        if self.chooser.choose(GUARD, budget) == made_of:
            return
        asked = GUARD in self.attempts
        if not asked:
            self._make(GUARD, GUARD, budget)
        uniform = self.attempts[GUARD]
        if uniform.held_out < chosen.held_out and self._guard_meets(self.options.budget):
            told = (
                f"uniform bits are better than those of {method} on samples held out "
                f"(output error {uniform.held_out:.1%} against {chosen.held_out:.1%}) and are used instead"
            )
            self.notes.append(told.capitalize() + ".")
            warnings.warn(f"caq: {told}; pass guard=False to keep those of {method}.", stacklevel=2)
            self.attempts[method], self.attempts[CHOSEN] = chosen, uniform
            self.metrics[method], self.metrics[CHOSEN] = self.metrics[CHOSEN], self.metrics[GUARD]
        if not asked:
            del self.attempts[GUARD], self.metrics[GUARD]
