"""Selection: the networks that a run makes, one a method, and which of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lightning_caq.allocation.budget import AvgBits, Budget, ErrorBudget, MaxDrop
from lightning_caq.allocation.choose import Choice, Chooser
from lightning_caq.allocation.solver.bisection import smallest_passing
from lightning_caq.allocation.steps import StepChoice
from lightning_caq.errors import BudgetError
from lightning_caq.notes import Note
from lightning_caq.options import QuantizationOptions
from lightning_caq.report import as_factor, in_figures
from lightning_caq.scores import NOISE, Difference, Score, log_ratio
from lightning_caq.selection.candidate import Candidate, CandidateMaker
from lightning_caq.selection.steps import StepSearch
from lightning_caq.studies import RatePoint
from lightning_caq.utilities.progress import Progress

CHOSEN, GUARD = "quantized", "uniform"


@dataclass(frozen=True)
class Selection:
    """The networks that were made, the one to keep among them.

    Attributes:
        candidates: The networks by variant: ``"quantized"``, which is kept, and each compared method.
        notes: What the reader of the report should know.
        tried: Of entropy-coded networks those that were tried on the way to the size of the one that is kept.
    """

    candidates: Mapping[str, Candidate]
    notes: tuple[Note, ...] = ()
    tried: tuple[RatePoint, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The network to keep."""
        return self.candidates[CHOSEN]


@dataclass(frozen=True)
class Selector:
    """Makes networks, judges each, and leaves the float network.

    Attributes:
        chooser: Allocates bits.
        maker: Rounds and repairs.
        judge: Metrics of the network as it is, by name.
        options: What the user chose.
        progress: Where to say what is being done.
        float_metrics: Metrics of the float network, by name.
        steps: Searches for steps where codes are entropy-coded, otherwise ``None``.
    """

    chooser: Chooser
    maker: CandidateMaker
    judge: Callable[[], dict[str, Score]]
    options: QuantizationOptions
    progress: Progress
    float_metrics: Mapping[str, Score]
    steps: StepSearch | None = None

    def select(self) -> Selection:
        """Make the network of the chosen method and all it is compared with, and decide between it and uniform bits."""
        method, budget, notes = self.options.method, self.options.budget, []
        if shortage := self.maker.shortage:
            notes.append(Note(f"{shortage}.", "warning"))
        if isinstance(budget, MaxDrop):
            chosen, note = self._smallest_within(budget)
            notes.append(note)
        else:
            chosen = self._make(method, budget)
        if isinstance(budget, (MaxDrop, ErrorBudget)):
            budget = AvgBits(chosen.plan.avg_bits)  # all others get the size that this one came to
        compared = {name: self._make(name, budget) for name in dict.fromkeys(self.options.compare) if name != method}
        candidates = {CHOSEN: chosen, **compared}
        if self.options.guard and (better := self._better_uniform(candidates, budget)):
            candidates |= {method: chosen, CHOSEN: better}
            notes.append(self._uniform_note(chosen, better))
        dropped = {x.plan.method: x.dropped for x in candidates.values() if x.dropped}
        if dropped:
            listed = "; ".join(f"{method}, {seen}" for method, seen in dropped.items())
            notes.append(Note(f"Repairs of statistics and biases were dropped, on samples held out: {listed}."))
        for note in notes:
            self.progress.tell(note)
        tried_steps = self.steps.tried if self.steps is not None else {}
        return Selection(candidates, tuple(notes), tuple(tried_steps.get(candidates[CHOSEN].plan.method, ())))

    def _make(self, method: str, budget: Budget) -> Candidate:
        return self._carry_out(method, budget, self._allocate(method, budget))

    def _allocate(self, method: str, budget: Budget) -> Choice | StepChoice:
        with self.progress.step(f"allocation ({method})"):
            return (self.steps or self.chooser).choose(method, budget)

    def _carry_out(self, method: str, budget: Budget, choice: Choice | StepChoice) -> Candidate:
        """Round and judge; the network is float again afterwards."""
        with ExitStack() as network:
            with self.progress.step(f"rounding ({method})"):
                candidate = network.enter_context(self.maker.made(method, str(budget), choice))
            with self.progress.step(f"evaluation ({method})"):
                return replace(candidate, metrics=self.judge())

    def _smallest_within(self, budget: MaxDrop) -> tuple[Candidate, Note]:
        """The smallest network that loses no more of a metric than allowed, and what stands behind that.

        A search over the average bits. A network passes if its drop, with two standard errors on top where they are
        known, is within the budget.
        """
        method = self.options.method
        tried: dict[Choice | StepChoice, Candidate] = {}

        def passes(avg_bits: float) -> bool:
            choice = self._allocate(method, AvgBits(avg_bits))
            if choice not in tried:
                tried[choice] = self._carry_out(method, AvgBits(avg_bits), choice)
                self.progress.say(
                    f"{avg_bits:.3f} bits on average: {budget.monitor} {self._seen(tried[choice], budget)}"
                )
            return self._drop(tried[choice], budget).most <= budget.value

        low, high = self.options.reach
        smallest_passing(passes, low, high, self.options.max_evaluations)
        certain = [x for x in tried.values() if self._drop(x, budget).most <= budget.value]
        within = certain or [x for x in tried.values() if self._drop(x, budget).value <= budget.value]
        if not within:
            best = min(tried.values(), key=lambda x: self._drop(x, budget).value)
            raise BudgetError(
                f"{budget} cannot be met: even with every layer at {high:g} bits {budget.monitor} is "
                f"{self._seen(best, budget)}; allow a larger drop or add larger bit-widths."
            )
        chosen = min(within, key=lambda candidate: candidate.plan.avg_bits)
        return chosen, self._drop_note(budget, chosen, tried=len(tried), certain=bool(certain))

    def _drop(self, candidate: Candidate, budget: MaxDrop) -> Difference:
        """By how much a network's metric is worse than the float network's."""
        change = candidate.metrics[budget.monitor].less(self.float_metrics[budget.monitor])
        return replace(change, value=-change.value if self.options.monitor_mode == "max" else change.value)

    def _seen(self, candidate: Candidate, budget: MaxDrop) -> str:
        """A network's metric, and its change from the float network's."""
        score = candidate.metrics[budget.monitor]
        return f"{score:.4g} ({in_figures(score.less(self.float_metrics[budget.monitor]))})"

    def _drop_note(self, budget: MaxDrop, chosen: Candidate, *, tried: int, certain: bool) -> Note:
        """What a decision by a drop rests on, and what it would take to be certain of it."""
        drop, before = self._drop(chosen, budget), self.float_metrics[budget.monitor]
        told = f"{budget}: {tried} networks were tried, the smallest within it has {self._seen(chosen, budget)}"
        if drop.stderr is None or before.samples is None:
            return Note(
                f"{told}. How sure that is is not known: standard errors take one value for each sample, or a metric "
                "of torchmetrics."
            )
        told += f" on {before.samples:,} samples"
        if 0 <= before <= 1:
            told += f", of which {budget.value:g} are {budget.value * before.samples:.3g}"
        enough = math.ceil(before.samples * (NOISE * drop.stderr / budget.value) ** 2) if budget.value else 0
        needed = f" To tell a drop of {budget.value:g} from none takes about {enough:,} samples." if enough else ""
        if certain:
            return Note(f"{told}; drop and two standard errors are within the budget.{needed}")
        return Note(
            f"{told}; no network is certain to be within the budget, by two standard errors, and this one is by its "
            f"estimate alone.{needed}",
            "warning",
        )

    def _better_uniform(self, candidates: Mapping[str, Candidate], budget: Budget) -> Candidate | None:
        """Uniform bits, if they are better on the samples held out and within what was asked for."""
        chosen, uniform = candidates[CHOSEN], candidates.get(GUARD)
        choice = uniform.choice if uniform else self._allocate(GUARD, budget)
        if choice == chosen.choice:
            return None
        uniform = uniform or self._carry_out(GUARD, budget, choice)
        return uniform if uniform.error < chosen.error and self._keeps_budget(uniform, chosen) else None

    def _keeps_budget(self, uniform: Candidate, chosen: Candidate) -> bool:
        """Whether uniform bits keep a budget that their size says nothing about."""
        budget = self.options.budget
        if isinstance(budget, MaxDrop):
            return self._drop(uniform, budget).most <= max(self._drop(chosen, budget).most, budget.value)
        if isinstance(budget, ErrorBudget) and isinstance(uniform.choice, Choice):
            return self.chooser.keeps(self.options.method, budget, uniform.choice.bits)
        return True

    def _uniform_note(self, chosen: Candidate, uniform: Candidate) -> Note:
        method, ratio = self.options.method, log_ratio(chosen.distances, uniform.distances)
        told = f", {as_factor(ratio)} sample by sample" if ratio is not None else ""
        return Note(
            f"Uniform bits are better than those of {method} on samples held out (output error {uniform.error:.1%} "
            f"against {chosen.error:.1%}{told}) and are used instead; pass guard=False to keep those of {method}.",
            "warning",
        )
