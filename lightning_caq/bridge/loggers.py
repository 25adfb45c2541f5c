"""Loggers: what differs between them in options and figures; they are known by what they can do and never imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_caq.bridge.packages import every
from lightning_caq.options import QuantizationOptions


def announce(trainer: Trainer, options: QuantizationOptions) -> None:
    """Put the options among the hyperparameters that TensorBoard's logger writes once, when training starts.

    They go to its file ``hparams.yaml``. Any other logger takes hyperparameters at any time.

    Args:
        trainer: The trainer, in ``setup``.
        options: The options.
    """
    for logger in list[Any](trainer.loggers):
        tensorboard = isinstance(logger, every("loggers", "TensorBoardLogger"))
        if tensorboard and isinstance(logger.hparams, dict):  # not a configuration of OmegaConf, which may be closed
            logger.hparams["caq"] = options.to_dict()


def log_pictures(logger: Any, pictures: Iterable[Path], step: int) -> None:
    """Send pictures to a logger under ``caq/<name>``; one that shows none is left alone.

    Known are a logger with a ``log_image`` of its own (Weights & Biases), an experiment that stores the artifacts of a
    run (MLflow), and an experiment with a ``log_image`` (Comet). TensorBoard gets its figures elsewhere.

    Args:
        logger: A logger of Lightning.
        pictures: The files.
        step: The training step at which they were drawn.

    Example:
        >>> class Shows:
        ...     def log_image(self, key, images, step):
        ...         print(key, images, step)
        >>> log_pictures(Shows(), [Path("out/bits.png")], 7)
        caq/bits ['out/bits.png'] 7
        >>> log_pictures(object(), [Path("out/bits.png")], 7)
    """
    experiment: Any = getattr(logger, "experiment", None)
    run = getattr(logger, "run_id", None)
    for path in pictures:
        if hasattr(logger, "log_image"):
            logger.log_image(f"caq/{path.stem}", [str(path)], step=step)
        elif run is not None and hasattr(experiment, "log_artifact"):
            experiment.log_artifact(run, str(path), "caq")
        elif hasattr(experiment, "log_image"):
            experiment.log_image(str(path), name=f"caq/{path.stem}", step=step)
