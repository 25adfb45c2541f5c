"""Outputs: what a run leaves in files, in the loggers and on the console, written by rank zero alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_caq.bridge.loggers import log_pictures
from lightning_caq.bridge.packages import every
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.files import scalars, write_outputs
from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.reporting.tensorboard import log_to_tensorboard


class Outcome(NamedTuple):
    """What a run leaves behind."""

    plan: QuantizationPlan
    profile: CurvatureProfile
    report: QuantizationReport


def float_weights(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """Copies of the weights by layer, for histograms; none where no TensorBoard will show them."""
    tensorboard: Any = every("loggers", "TensorBoardLogger")
    if not any(isinstance(logger, tensorboard) for logger in trainer.loggers) or not trainer.is_global_zero:
        return {}
    named = pl_module.named_parameters()
    return {n.removesuffix(".weight"): p.detach().cpu().clone() for n, p in named if n.endswith(".weight")}


def write(trainer: Trainer, directory: Path, outcome: Outcome, floats: Mapping[str, Tensor]) -> None:
    """Write files, loggers and the table on the console.

    Args:
        trainer: The trainer.
        directory: Where the files go.
        outcome: What came of the run.
        floats: Weights of the float network by layer, for histograms; may be empty.

    Raises:
        OSError: If the files cannot be written.
    """
    if not trainer.is_global_zero:
        return
    plan, profile, report = outcome
    gallery = draw_gallery(report, profile)
    written = write_outputs(directory, plan, profile, report, gallery)
    pictures = [path for path in written if path.suffix == ".png"]
    step, tensorboard = trainer.global_step, every("loggers", "TensorBoardLogger")
    size, loggers = report.sizes["quantized"], list[Any](trainer.loggers)
    for logger in loggers:
        logger.log_metrics(scalars(report, profile), step=step)
        if isinstance(logger, tensorboard):
            log_to_tensorboard(logger.experiment, plan, profile, report, step, gallery=gallery, floats=floats)
            # Without metrics Lightning would write a column of its own, hp_metric.
            figures = {"caq/avg_bits": size.avg_bits, "caq/ratio": size.ratio}
            logger.log_hyperparams({"caq": report.options}, figures)
        else:
            log_pictures(logger, pictures, step)
            logger.log_hyperparams({"caq": report.options})
        logger.save()
    trainer.print(f"\n{report.tables()}\n")
    rank_zero_info(f"caq: plan, report and figures are in {directory}.")


def shows_progress(trainer: Trainer) -> bool:
    """Whether the trainer draws progress bars, and there is a terminal to draw one on."""
    return trainer.progress_bar_callback is not None and trainer.is_global_zero and sys.stderr.isatty()
