"""Evolution: a search with real evaluations, in the place of HAQ (Wang et al. 2019) and AutoQ (Lou et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from lightning_caq.allocation.search import Bits, SearchSpace
from lightning_caq.profile import CurvatureProfile

EVALUATIONS = 200
POPULATION = 20


class Method:
    """An evolutionary search over allocations within the budget: at most 200 evaluations of the network.

    HAQ and AutoQ let a reinforcement learner choose the bits and reward it by the accuracy of the network that
    results. This is not their learner. It shares what sets them apart from all tables of costs: the whole network is
    judged, with all layers rounded, by real evaluations. Twenty random allocations start it; then, again and again,
    two parents, each the better of two drawn at random, are mixed layer by layer, one layer is moved by a step, the
    budget is met and used up, and the child takes the place of the worst if it is better (a steady-state genetic
    algorithm). Only ranks count, so the unit of the objective does not matter.

    Example:
        >>> space = SearchSpace(choices=((2, 3, 4),) * 6, rates=np.full((1, 6), 10.0), limits=np.array([180.0]))
        >>> loss = lambda bits: sum(i * 0.25**b for i, b in enumerate(bits))
        >>> Method().search(CurvatureProfile(()), space, loss, seed=0)
        (2, 2, 3, 3, 4, 4)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def search(
        self, profile: CurvatureProfile, space: SearchSpace, evaluate: Callable[[tuple[int, ...]], float], seed: int
    ) -> tuple[int, ...]:
        """The best allocation seen."""
        rng = np.random.default_rng(seed)
        drawn = {space.draw(rng): None for _ in range(POPULATION)}
        population = sorted((evaluate(bits), bits) for bits in drawn)
        for _ in range(EVALUATIONS - POPULATION):
            child = _child(_parent(population, rng), _parent(population, rng), space, rng)
            if all(child != bits for _, bits in population):
                population = sorted([*population, (evaluate(child), child)])[:POPULATION]
        return population[0][1]


def _parent(population: list[tuple[float, Bits]], rng: np.random.Generator) -> Bits:
    """The better of two at random; the population is sorted."""
    return population[int(rng.integers(len(population), size=2).min())][1]


def _child(first: Bits, second: Bits, space: SearchSpace, rng: np.random.Generator) -> Bits:
    mixed = tuple(a if rng.random() < 0.5 else b for a, b in zip(first, second, strict=True))
    moves = [*space.lower(mixed).items(), *space.higher(mixed).items()]
    if not moves:
        return mixed
    layer, moved = moves[int(rng.integers(len(moves)))]
    return space.settle(moved, rng, kept=layer)
