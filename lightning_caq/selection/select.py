"""Selection: the networks that a run makes, one a method, and which of them is kept."""

from __future__ import annotations

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
from lightning_caq.scores import Score
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
            chosen, tried = self._smallest_within(budget)
            notes.append(Note(f"{budget}: {tried} networks were tried; more max_evaluations search more finely."))
        else:
            chosen = self._make(method, budget)
        if isinstance(budget, (MaxDrop, ErrorBudget)):
            budget = AvgBits(chosen.plan.avg_bits)  # all others get the size that this one came to
        compared = {name: self._make(name, budget) for name in dict.fromkeys(self.options.compare) if name != method}
        candidates = {CHOSEN: chosen, **compared}
        if self.options.guard and (better := self._better_uniform(candidates, budget)):
            candidates |= {method: chosen, CHOSEN: better}
            notes.append(self._uniform_note(chosen, better))
        of_candidates = dict.fromkeys(f"{x.plan.method}: {note}." for x in candidates.values() for note in x.notes)
        notes += map(Note, of_candidates)
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

    def _smallest_within(self, budget: MaxDrop) -> tuple[Candidate, int]:
        """The smallest network that loses no more of a metric than allowed, and how many were tried.

        Bisection over the average bits.
        """
        method = self.options.method
        tried: dict[Choice | StepChoice, Candidate] = {}

        def passes(avg_bits: float) -> bool:
            choice = self._allocate(method, AvgBits(avg_bits))
            if choice not in tried:
                tried[choice] = self._carry_out(method, AvgBits(avg_bits), choice)
                drop = self._drop(tried[choice], budget)
                self.progress.say(f"{avg_bits:.3f} bits on average: {budget.monitor} drops by {drop:.4g}")
            return self._drop(tried[choice], budget) <= budget.value

        low, high = self.options.reach
        if smallest_passing(passes, low, high, self.options.max_evaluations) is None:
            least = min(self._drop(candidate, budget) for candidate in tried.values())
            raise BudgetError(
                f"{budget} cannot be met: even with every layer at {high:g} bits {budget.monitor} drops by "
                f"{least:.4g}; allow a larger drop or add larger bit-widths."
            )
        good = [candidate for candidate in tried.values() if self._drop(candidate, budget) <= budget.value]
        return min(good, key=lambda candidate: candidate.plan.avg_bits), len(tried)

    def _drop(self, candidate: Candidate, budget: MaxDrop) -> float:
        """By how much a network's metric is worse than the float network's."""
        sign = 1 if self.options.monitor_mode == "max" else -1
        return sign * (self.float_metrics[budget.monitor] - candidate.metrics[budget.monitor])

    def _better_uniform(self, candidates: Mapping[str, Candidate], budget: Budget) -> Candidate | None:
        """Uniform bits, if they are better on the samples held out and within what was asked for."""
        chosen, uniform = candidates[CHOSEN], candidates.get(GUARD)
        choice = uniform.choice if uniform else self._allocate(GUARD, budget)
        if choice == chosen.choice:
            return None
        uniform = uniform or self._carry_out(GUARD, budget, choice)
        return uniform if uniform.error < chosen.error and self._keeps_budget(uniform) else None

    def _keeps_budget(self, uniform: Candidate) -> bool:
        """Whether uniform bits keep a budget that their size says nothing about."""
        budget = self.options.budget
        if isinstance(budget, MaxDrop):
            return self._drop(uniform, budget) <= budget.value
        if isinstance(budget, ErrorBudget) and isinstance(uniform.choice, Choice):
            return self.chooser.keeps(self.options.method, budget, uniform.choice.bits)
        return True

    def _uniform_note(self, chosen: Candidate, uniform: Candidate) -> Note:
        method = self.options.method
        return Note(
            f"Uniform bits are better than those of {method} on samples held out (output error {uniform.error:.1%} "
            f"against {chosen.error:.1%}) and are used instead; pass guard=False to keep those of {method}.",
            "warning",
        )
