"""Metrics by groups of samples: what a torchmetrics metric would be without each group, so that it has an error.

A metric adds up states, sums or lists, from which a group's own part can be left out again. That takes every metric
whose states are made so, whatever it computes of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_sum

from lightning_caq.network.batches import FAILURES
from lightning_caq.scores import FEWEST_GROUPS, Score

Parts = Mapping[Any, Sequence[int]]
"""Group to its places in a batch."""

State = dict[str, Any]
_SLOWEST = 0.1  # seconds of one computation, of which there is one a group
_CLOSE = 1e-4


class MetricGroups:
    """The states of one metric by groups of samples, beside the metric itself, which is left as it is.

    Args:
        metric: The metric.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> groups = MetricGroups(MeanMetric())
        >>> groups.add((torch.arange(8.0),), {}, {i: [i] for i in range(8)}, samples=8, whole="batch 0")
        >>> groups.score(3.5).groups.round(4).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = _alone(metric)
        self._states: dict[Hashable, State] = {}
        self._sizes: dict[Hashable, int] = {}

    @staticmethod
    def can_take(metric: Metric) -> bool:
        """Whether groups can be left out of a metric's states, and an update is cheap: one with a network is not."""
        usable = all(
            isinstance(metric._defaults[name], list) or reduction in (dim_zero_sum, dim_zero_cat)
            for name, reduction in metric._reductions.items()
        )
        return usable and bool(metric._defaults) and next(metric.parameters(), None) is None

    def shared_with(self, metric: Metric) -> MetricGroups:
        """The same states for another metric that computes something else of them."""
        other = MetricGroups(metric)
        other._states, other._sizes = self._states, self._sizes
        return other

    def add(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], parts: Parts, *, samples: int, whole: Hashable
    ) -> None:
        """Add a batch.

        Args:
            args: What the metric was updated with.
            kwargs: The same, by name.
            parts: The batch's groups.
            samples: Samples of the batch.
            whole: The group that all of it is, if it cannot be cut.
        """
        if not all(_can_cut(x, samples) for x in (*args, *kwargs.values())):
            parts = {whole: range(samples)}
        for group, places in parts.items():
            whole_batch = len(places) == samples
            self._metric.reset()
            self._metric.update(
                *(x if whole_batch else _cut(x, places, samples) for x in args),
                **{name: x if whole_batch else _cut(x, places, samples) for name, x in kwargs.items()},
            )
            state = {name: _kept(getattr(self._metric, name)) for name in self._metric._defaults}
            known = self._states.get(group)
            self._states[group] = state if known is None else _merged([known, state])
            self._sizes[group] = self._sizes.get(group, 0) + len(places)

    def score(self, value: float | None = None) -> Score | None:
        """The metric with its groups.

        Args:
            value: What the metric itself computed; if the groups do not give it again they are not used. ``None``
                where other processes had a part in it.

        Returns:
            The score; ``None`` where the groups are too few, or cannot tell.
        """
        if len(self._sizes) < FEWEST_GROUPS:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that are not defined without a group
            try:
                start = time.perf_counter()
                whole = self._value(_merged(list(self._states.values())))
                value = whole if value is None else value
                if time.perf_counter() - start > _SLOWEST or not abs(whole - value) <= _CLOSE * max(1.0, abs(value)):
                    return None
                without = [self._value(state) for state in self._without()]
            except FAILURES:
                return None
        return Score.of_parts(value, without, list(self._sizes.values()))

    def _without(self) -> list[State]:
        """The states without each group."""
        totals = {
            name: torch.stack([x[name].double() if x[name].is_floating_point() else x[name] for x in states]).sum(0)
            for states in (list(self._states.values()),)
            for name, default in self._metric._defaults.items()
            if isinstance(default, Tensor) and self._metric._reductions[name] is dim_zero_sum
        }
        left = []
        for group, state in self._states.items():
            others = [x for key, x in self._states.items() if key != group]
            lists = [name for name in state if name not in totals]
            rest = _merged([{name: x[name] for name in lists} for x in others]) if lists else {}
            left.append({name: (total - state[name]).to(state[name]) for name, total in totals.items()} | rest)
        return left

    def _value(self, state: State) -> float:
        self._metric.reset()
        for name, value in state.items():
            setattr(self._metric, name, _kept(value))
        self._metric._update_count = 1
        return float(self._metric.compute())


def _alone(metric: Metric) -> Metric:
    """A copy that does not talk to other processes."""
    alone = metric.clone()
    copied: Any = alone
    copied.sync_on_compute = copied._to_sync = copied.dist_sync_on_step = False
    for name in ("update", "forward"):  # those of the original may be watched
        vars(copied).pop(name, None)
    copied.update = copied._wrap_update(type(copied).update.__get__(copied))
    if hasattr(copied, "validate_args"):
        copied.validate_args = False
    return alone


def _kept(value: Any) -> Any:
    """A state that outlives a reset, which empties lists in place."""
    return list(value) if isinstance(value, list) else value


def _merged(states: Sequence[State]) -> State:
    """States of several groups, taken together."""
    merged: State = {}
    for name, first in states[0].items():
        values = [state[name] for state in states]
        if isinstance(first, list):
            merged[name] = [x for value in values for x in value]
        else:
            merged[name] = torch.stack(values).sum(0)
    return merged


def _can_cut(value: Any, samples: int) -> bool:
    """Whether what a metric is given is of single samples; a number or a word is for all of them."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) > 0 and len(value) % samples == 0
    return not isinstance(value, (list, tuple)) or len(value) == samples


def _cut(value: Any, places: Sequence[int], samples: int) -> Any:
    """Some samples of what a metric is given; a sample may have several rows, one after the other."""
    if isinstance(value, Tensor):
        return value.unflatten(0, (samples, -1))[list(places)].flatten(0, 1)
    return [value[i] for i in places] if isinstance(value, (list, tuple)) else value
