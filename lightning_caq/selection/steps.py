"""Search for steps: a method's sensitivities, a rule judged on samples held out, and one multiplier for a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.budget import AvgBits, Budget, MaxBytes, Ratio
from lightning_caq.allocation.steps import EXPONENTS, StepChoice, equal_slope, search_multiplier, sensitivities
from lightning_caq.errors import BudgetError
from lightning_caq.export.packed import quantized_bytes
from lightning_caq.network.batches import take_samples
from lightning_caq.network.layers import layer_weight
from lightning_caq.profile import CurvatureProfile
from lightning_caq.quantizers.rounding.round_steps import StepRounding
from lightning_caq.selection.candidate import CandidateMaker
from lightning_caq.sizes import FLOAT_BITS
from lightning_caq.studies import RatePoint

_SAMPLES = 128  # what rules are compared with
_START = 0.5  # standard deviations
_MOST_BITS = 16  # a weight; more change no output that float32 can tell


@dataclass
class StepSearch:
    """Finds steps within a budget of bytes; each multiplier that is tried is a rounding of the network.

    Attributes:
        maker: Rounds the network.
        profile: What was measured of it.
        bits: The bit-widths at which it was measured.
        exponents: Method to the power of its sensitivities that was found best, once it was looked for.
        tried: Method to the networks that were tried with it, but for those of the comparison of powers.
    """

    maker: CandidateMaker
    profile: CurvatureProfile
    bits: Sequence[int]
    exponents: dict[str, float] = field(default_factory=dict)
    tried: dict[str, list[RatePoint]] = field(default_factory=dict)

    def choose(self, method: str, budget: Budget) -> StepChoice:
        """Steps of all layers.

        The power of the sensitivities is the one with the least output error on the samples held out, at equal bytes,
        with scalar rounding fitted to few samples; it is looked for once a method.

        Args:
            method: Name of a table method.
            budget: Average bits, a ratio or bytes.

        Raises:
            BudgetError: If no steps are large enough.
        """
        g = sensitivities(method, self.profile, self.bits)
        start = _START * self._spread()
        if float(np.ptp(np.log(g))) == 0:
            self.exponents[method] = 0.0
        if method not in self.exponents:
            self.exponents[method], start = self._best_exponent(g, budget, start)
        exponent = self.exponents[method]
        choice, _, tried = self._search(self.maker, g, exponent, self._limit(budget, self.maker), start)
        self.tried.setdefault(method, []).extend(tried)
        return choice

    def _best_exponent(self, g: NDArray[np.float64], budget: Budget, start: float) -> tuple[float, float]:
        """The power that is best, and the multiplier that it took."""
        fitted = take_samples(self.maker.fitted, _SAMPLES)
        quick = replace(self.maker, fitted=fitted, steps=replace(self.maker.steps, trellis=False), repair=None)
        limit = self._limit(budget, quick)
        errors: dict[float, tuple[float, float]] = {}
        for exponent in EXPONENTS:
            choice, error, _ = self._search(quick, g, exponent, limit, start)
            start = choice.steps[0] / equal_slope(g, self._weights, 1.0, exponent)[0]
            errors[exponent] = error, start
        best = min(errors, key=lambda exponent: errors[exponent][0])
        return best, errors[best][1]

    def _search(
        self, maker: CandidateMaker, g: NDArray[np.float64], exponent: float, limit: float, start: float
    ) -> tuple[StepChoice, float, list[RatePoint]]:
        """The steps that use a number of bytes up, the output error that they leave, and all that were tried."""
        tried: dict[float, RatePoint] = {}

        def choice(multiplier: float) -> StepChoice:
            steps = equal_slope(g, self._weights, multiplier, exponent)
            return StepChoice(steps, maker.sizes.activation_bits, exponent)

        def coded_bytes(multiplier: float) -> int:
            size, error = maker.try_steps(choice(multiplier))
            tried[multiplier] = RatePoint(8 * size / sum(self._weights), error)
            return size

        best = search_multiplier(coded_bytes, limit, start=start, weights=sum(self._weights))
        return choice(best), tried[best].output_error, list(tried.values())

    def _limit(self, budget: Budget, maker: CandidateMaker) -> float:
        """Bytes that the stream of codes may take; no more than are of use."""
        return min(self._granted(budget, maker), _MOST_BITS * sum(self._weights) / 8)

    def _granted(self, budget: Budget, maker: CandidateMaker) -> float:
        sizes = maker.sizes
        if isinstance(budget, AvgBits):
            return budget.value * sum(sizes.weights) / 8
        if isinstance(budget, Ratio):
            total = FLOAT_BITS * (sum(sizes.weights) + sizes.unquantized)
            return (total / budget.value - sizes.tables([0] * len(sizes.weights)) - FLOAT_BITS * sizes.unquantized) / 8
        if isinstance(budget, MaxBytes):
            return budget.value - self._other_bytes(maker)
        raise BudgetError(f"{budget} is no budget for coding='entropy'; give avg_bits, ratio or max_bytes.")

    def _other_bytes(self, maker: CandidateMaker) -> int:
        """Bytes of the file that are not codes."""
        steps = (4 * self._spread(),) * len(self._weights)
        rough = replace(maker, steps=StepRounding(looks=False, trellis=False), repair=None)
        with rough.made("uniform", "", StepChoice(steps)) as candidate:
            size = quantized_bytes(maker.model)
        codes = sum(round(n * b / 8) for n, b in zip(self._weights, candidate.plan.bits.values(), strict=True))
        return size - codes + 4 * len(steps)  # figures in its header may be a little longer

    @property
    def _weights(self) -> tuple[int, ...]:
        return self.maker.sizes.weights

    def _spread(self) -> float:
        """Root mean square of all weights."""
        weights = [layer_weight(self.maker.model, x).detach().double() for x in self.maker.layers]
        squares = sum(float(x.square().sum()) for x in weights)
        return float(max((squares / sum(self._weights)) ** 0.5, 1e-12))
