"""Trainers: what is asked of a Trainer before work starts, and what is said to the callbacks beside ours."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_caq.bridge.packages import every
from lightning_caq.errors import OptionError


def is_trial(trainer: Trainer) -> bool:
    """Whether the run only tries the code out, with ``fast_dev_run``."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def refuse_sharded(trainer: Trainer) -> None:
    """Refuse strategies that spread the weights of a layer over processes.

    Args:
        trainer: The trainer.

    Raises:
        OptionError: If the weights are sharded.
    """
    for name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        if isinstance(trainer.strategy, every("strategies", name)):
            raise OptionError(
                f"{name} shards the weights, so no process sees a whole layer to quantize; train without "
                "this callback, then load the checkpoint on one device and run trainer.validate with it."
            )


def is_superseded(trainer: Trainer, callback: Any) -> bool:
    """Whether another callback of the same class comes later: the one from the command line follows those of YAML.

    Args:
        trainer: The trainer.
        callback: The callback.
    """
    return any(isinstance(x, type(callback)) for x in later(trainer, callback))


def later(trainer: Any, callback: Any) -> list[Any]:
    """The callbacks that follow another one in the list; none if that is not in it."""
    place = next((i for i, other in enumerate(trainer.callbacks) if other is callback), len(trainer.callbacks))
    return list(trainer.callbacks[place + 1 :])


def warn_of_late_averaging(trainer: Trainer, callback: Any) -> None:
    """Warn of callbacks that still change the weights after ``callback`` has quantized them.

    Args:
        trainer: The trainer.
        callback: The callback whose place in the list matters.
    """
    for name in ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning"):
        kinds = every("callbacks", name)
        if any(isinstance(x, kinds) for x in later(trainer, callback)):
            rank_zero_warn(
                f"caq: {name} comes after {type(callback).__name__} in the list of callbacks: the weights are "
                f"quantized without it, and what it does to them then may spoil that; put {name} first."
            )
