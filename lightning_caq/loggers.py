"""Loggers: the figures of a run, for every logger that shows pictures, known by what it can do and never imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
