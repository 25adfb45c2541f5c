"""The metric that ``max_drop`` watches: whether validation logs it, and whether more or less of it is better."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_caq.errors import BudgetError
from lightning_caq.options import QuantizationOptions
from lightning_caq.utilities.metric_names import Direction, direction_of_name


class WatchedMetric:
    """Looks the metric up the first time that a fit validates, long before the search for ``max_drop`` needs it.

    Args:
        options: The options of the callback.
    """

    def __init__(self, options: QuantizationOptions) -> None:
        self._options = options
        self._direction: Direction | None = None
        self._seen = False

    def restart(self) -> None:
        """Forget the last fit."""
        self._direction, self._seen = None, False

    def refuse_without_validation(self, trainer: Any) -> None:
        """Refuse a metric to watch where a fit has no validation.

        Raises:
            BudgetError: If so.
        """
        if self._options.max_drop is not None and not trainer.enable_validation:
            raise BudgetError(
                f"{self._options.budget} needs validation, and there is none: give a val_dataloader and a "
                "validation_step, leave limit_val_batches above 0, or choose another budget."
            )

    def look(self, trainer: Any, pl_module: LightningModule) -> None:
        """See what validation has just logged.

        Raises:
            BudgetError: If the metric is not among it.
            OptionError: If nothing tells its direction.
        """
        monitor = self._options.monitor
        if monitor is None or self._seen:
            return
        logged = trainer._logger_connector.metrics["callback"]  # callback_metrics has those of training too
        if not logged and trainer.sanity_checking:
            return  # a module may log nothing then
        if monitor not in (*logged, self._options.objective):
            names = ", ".join(map(repr, logged)) or "nothing"
            raise BudgetError(
                f"monitor={monitor!r} is not among the metrics that validation logs, which are {names}; name one of "
                "these, or log it in validation."
            )
        self._seen = True
        self._direction = _of_logged(trainer, monitor)
        self._options.directed(self.directions(trainer, pl_module))

    def directions(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[str], Direction | None]:
        """Whether more or less of a metric is better, by its name, as far as anything tells."""
        return partial(self._of, trainer, pl_module)

    def _of(self, trainer: Trainer, pl_module: LightningModule, name: str) -> Direction | None:
        return (
            self._direction or _of_attribute(pl_module, name) or _of_callbacks(trainer, name) or direction_of_name(name)
        )


def _of_logged(trainer: Any, name: str) -> Direction | None:
    """By the torchmetrics metric that was logged under the name."""
    for result in trainer._results.values():
        if result.meta.name == _bare(name) and isinstance(result.value, Metric):
            return _of_metric(result.value)
    return None


def _of_attribute(pl_module: LightningModule, name: str) -> Direction | None:
    """By the torchmetrics metric that the module, or one of its collections, holds under the name."""
    for path, module in pl_module.named_modules():
        if isinstance(module, Metric) and path.rpartition(".")[2] == _bare(name):
            return _of_metric(module)
    return None


def _of_metric(metric: Metric) -> Direction | None:
    return None if metric.higher_is_better is None else "max" if metric.higher_is_better else "min"


def _of_callbacks(trainer: Any, name: str) -> Direction | None:
    """By the mode of a callback that watches the same metric."""
    modes = (getattr(callback, "mode", None) for callback in trainer.callbacks if _watches(callback, name))
    return next((mode for mode in modes if mode in ("max", "min")), None)


def _watches(callback: Any, name: str) -> bool:
    return getattr(callback, "monitor", None) == name


def _bare(name: str) -> str:
    return name.partition("/dataloader_idx_")[0]
