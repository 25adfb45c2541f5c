"""Metrics: which one to show, which way is better, and what it is called."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_caq.utilities.metric_names import direction_of_name

_OBJECTIVES = {"distill": "divergence from the float outputs (nat)", "task": "calibration loss (nat)"}


def headline_metric(names: Sequence[str]) -> str | None:
    """The metric to show where there is room for one: an accuracy, else another of the user's, else the objective.

    Example:
        >>> headline_metric(["distill", "val_loss", "val_acc"])
        'val_acc'
    """
    return min(names, key=lambda name: ("acc" not in name.lower(), name in _OBJECTIVES), default=None)


def smaller_is_better(name: str) -> bool:
    """Whether a metric is a loss or an error, judged by its name.

    Example:
        >>> smaller_is_better("val_loss"), smaller_is_better("val_acc")
        (True, False)
    """
    return direction_of_name(name) == "min"


def metric_label(name: str) -> str:
    """A metric in words, with its unit and the better direction.

    Example:
        >>> metric_label("distill"), metric_label("val_acc")
        ('divergence from the float outputs (nat), lower is better', 'val_acc, higher is better')
    """
    return f"{_OBJECTIVES.get(name, name)}, {'lower' if smaller_is_better(name) else 'higher'} is better"
