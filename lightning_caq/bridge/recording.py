"""Recording: the metrics of a validation loop, batch by batch and by groups of samples, as the loop computes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_caq.bridge.metric_groups import MetricGroups, Parts
from lightning_caq.bridge.packages import Callback
from lightning_caq.bridge.ranks import sharing
from lightning_caq.bridge.undisturbed import undisturbed
from lightning_caq.network.batches import FAILURES, batch_size, pick
from lightning_caq.scores import Score

_GROUPS = 64
_ENOUGH, _PARTS = 8, 32  # batches that are groups enough, and parts that fewer are cut into
_MOST_UPDATES = 4096  # of one metric by groups, about a second


class Recorder(Callback):
    """Watches a validation loop and tells what its metrics rest on.

    Metrics of torchmetrics are kept by 64 groups, which samples are dealt to at random, the same for every network.
    Of numbers that are logged batch by batch the batches are the groups; where these are fewer than 8, they are
    validated once more in parts, if a number is the mean over these. Numbers that a module logs when validation ends
    are known by their values alone.

    Args:
        module: The module that is validated.
        batches: How many batches there are.
    """

    def __init__(self, module: LightningModule, batches: float) -> None:
        self._module = module
        self._dealt = int(max(1, min(_GROUPS, _MOST_UPDATES / batches)))
        self._deck: list[int] = []
        self._random = np.random.default_rng(0)
        self._seen, self._samples = -1, 0
        self._parts: Parts = {}
        self._metrics: dict[int, tuple[MetricGroups, MetricGroups]] = {}  # by groups of samples, and by batches
        self._sums: dict[str, list[tuple[float, float]]] = {}
        self._batches, self._listening = batches, True
        self._of_parts: dict[tuple[str, int], list[tuple[float, int]]] = {}

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a batch; deals its samples to groups."""
        self._seen, self._samples = self._seen + 1, max(batch_size(batch), 1)
        count = min(self._dealt, self._samples)
        while len(self._deck) < count:
            self._deck += self._random.permutation(_GROUPS).tolist()
        groups, self._deck = self._deck[:count], self._deck[count:]
        parts: dict[int, list[int]] = {}
        for i, place in enumerate(self._random.permutation(self._samples).tolist()):
            parts.setdefault(groups[i % len(groups)], []).append(place)
        self._parts = parts

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Called after a batch; notes what logged means have come to, and those of its parts where batches are few."""
        for result in _results(trainer):
            if result.is_tensor and result.meta.on_epoch and result.meta.is_mean_reduction:
                so_far = float(result.value), float(result.cumulated_batch_size)
                self._sums.setdefault(_name(result), []).append(so_far)
        if self._batches < _ENOUGH and self._samples > 1:
            self._validate_parts(batch, batch_idx, dataloader_idx)

    def _validate_parts(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run the validation step on parts of a batch, and note the numbers that it logs."""
        count = min(math.ceil(_PARTS / self._batches), self._samples)
        places = self._random.permutation(self._samples)
        taken = inspect.signature(self._module.validation_step).parameters
        loader = {"dataloader_idx": dataloader_idx} if "dataloader_idx" in taken else {}
        for part in np.array_split(places, count):
            logged: dict[str, float] = {}
            self._listening = False
            with undisturbed(self._module), _logging_to(self._module, logged):
                try:
                    self._module.validation_step(pick(batch, part.tolist()), batch_idx, **loader)
                except FAILURES:
                    return
                finally:
                    self._listening = True
            for name, value in logged.items():
                self._of_parts.setdefault((name, dataloader_idx), []).append((value, len(part)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what metrics are updated with, while open."""
        with ExitStack() as stack:
            for metric in self._module.modules():
                if isinstance(metric, Metric) and MetricGroups.can_take(metric):
                    self._watch(stack, metric)
            yield

    def scores(self, trainer: Trainer, values: dict[str, float]) -> dict[str, Score]:
        """The logged values with their groups, those of all ranks where a value is of all ranks' samples.

        Args:
            trainer: The trainer, its loop at its end.
            values: What the loop gave, by name.
        """
        ranks, own, pooled = sharing(trainer), {}, []
        for result in _results(trainer):
            name, several = _name(result), ranks.size > 1 and (not result.is_tensor or result.meta.sync.should)
            if name not in values:
                continue
            value = None if several else values[name]
            score = self._mean(name, value) if result.is_tensor else self._of_metric(result.value, value)
            if score is not None:
                own[name] = score
            if several:
                pooled.append(name)
        everyone = ranks.gather({f"{ranks.rank}": own}, "metrics by groups")
        for name in pooled:
            parts = [scores[name] for scores in everyone.values() if name in scores]
            if len(parts) == ranks.size:
                groups, sizes = (np.concatenate([getattr(x, part) for x in parts]) for part in ("groups", "sizes"))
                own[name] = Score(values[name], groups, sizes)
        return {name: own.get(name, Score(value)) for name, value in values.items()}

    def _watch(self, stack: ExitStack, metric: Metric) -> None:
        """Note the arguments of ``forward``, which may call ``update`` twice, and of ``update`` outside it."""
        original: dict[str, Callable[..., Any]] = {name: getattr(metric, name) for name in ("forward", "update")}
        inside: list[bool] = []

        def watched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if not inside and self._listening:
                    self._add(metric, args, kwargs)
                inside.append(True)
                try:
                    return original[name](*args, **kwargs)
                finally:
                    inside.pop()

            return call

        for name in original:
            before = vars(metric).get(name)
            stack.callback(vars(metric).pop if before is None else vars(metric).__setitem__, name, before)
            vars(metric)[name] = watched(name)

    def _add(self, metric: Metric, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(metric) not in self._metrics:
            self._metrics[id(metric)] = MetricGroups(metric), MetricGroups(metric)
        batch = f"batch {self._seen}"
        for groups, parts in zip(self._metrics[id(metric)], (self._parts, {}), strict=True):
            groups.add(args, kwargs, parts or {batch: range(self._samples)}, samples=self._samples, whole=batch)

    def _of_metric(self, metric: Metric, value: float | None) -> Score | None:
        known: Sequence[MetricGroups] = self._metrics.get(id(metric), ())
        for collection in self._module.modules():  # of metrics that share their states only the first is updated
            if isinstance(collection, MetricCollection):
                for names in collection.compute_groups.values():
                    first, *others = (getattr(collection, name) for name in names)
                    if any(other is metric for other in others) and id(first) in self._metrics:
                        known = [groups.shared_with(metric) for groups in self._metrics[id(first)]]
        # A metric that treats a batch as a whole, as one that takes logits for probabilities, has batches for groups.
        return next((score for groups in known if (score := groups.score(value)) is not None), None)

    def _mean(self, name: str, value: float | None) -> Score | None:
        """A logged mean, from the sums that it had after each batch."""
        sums = np.diff([(0.0, 0.0), *self._sums.get(name, [])], axis=0)
        sums = sums[sums[:, 1] > 0]
        if not len(sums):
            return None
        score = Score.of_means(sums[:, 0] / sums[:, 1], sums[:, 1])
        plain, _, loader = name.partition("/dataloader_idx_")
        parts = self._of_parts.get((plain, int(loader or 0)), [])
        if len(parts) > len(sums):
            means, sizes = zip(*parts, strict=True)
            finer = Score.of_means(means, sizes)
            if np.isclose(float(finer), float(score), rtol=1e-3):
                score = finer
        if value is None:
            return score
        return Score(value, score.groups, score.sizes) if np.isclose(float(score), value, rtol=1e-4) else None


@contextmanager
def _logging_to(module: LightningModule, logged: dict[str, float]) -> Iterator[None]:
    """Let a module log single numbers into a dictionary, and nothing anywhere else."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, Metric) and kwargs.get("on_epoch") is not False:
            logged[name] = float(value)

    own = vars(module).get("log")
    vars(module)["log"] = log
    try:
        yield
    finally:
        vars(module).pop("log") if own is None else vars(module).__setitem__("log", own)


def _results(trainer: Any) -> list[Any]:
    return list(trainer._results.values()) if trainer._results is not None else []


def _name(result: Any) -> str:
    """The name that a metric is reported under."""
    meta = result.meta
    loader = meta.dataloader_idx if meta.add_dataloader_idx else None
    return str(meta.name) if loader is None else f"{meta.name}/dataloader_idx_{loader}"
