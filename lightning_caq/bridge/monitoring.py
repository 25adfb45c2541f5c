"""Monitoring: the curvature of a network while it trains."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_caq.bridge import ranks
from lightning_caq.bridge.calibration import training_batches
from lightning_caq.bridge.loss import training_loss
from lightning_caq.measures.measure import measure
from lightning_caq.network.layers import find_layers
from lightning_caq.network.parts.expand import every_weight_a_layer, expand_uses
from lightning_caq.network.prepare import prepare
from lightning_caq.options import QuantizationOptions
from lightning_caq.studies import EpochCurvature
from lightning_caq.utilities.contexts import InFloat32, curvature_safe
from lightning_caq.utilities.isolation import preserved

MONITORED = frozenset({"kappa", "lipschitz", "trace", "top_eigenvalue"})


class Monitor:
    """Measures and logs the curvature of every so many epochs of a training run.

    Args:
        every_n_epochs: How many epochs lie between two measurements; 0 for none at all.

    Attributes:
        epochs: What was measured in this run.
    """

    def __init__(self, every_n_epochs: int) -> None:
        self._every = every_n_epochs
        self.restart()

    def restart(self) -> None:
        """Forget the last run."""
        self._last: int | None = None  # a measurement that failed is not tried again in the same epoch
        self.epochs: list[EpochCurvature] = []

    def look(self, trainer: Trainer, pl_module: LightningModule, options: QuantizationOptions) -> None:
        """Measure and log, if it is time to; the network is not touched."""
        epoch = trainer.current_epoch
        if not self._every or (self._last is not None and epoch - self._last < self._every):
            return
        self._last = epoch
        figures = training_figures(trainer, pl_module, options)
        self.epochs.append(EpochCurvature(epoch, figures))
        for logger in trainer.loggers:
            logger.log_metrics({f"caq/training/{name}": x for name, x in figures.items()}, step=trainer.global_step)


def training_figures(trainer: Trainer, pl_module: LightningModule, options: QuantizationOptions) -> dict[str, float]:
    """Measure κ, L, trace and top eigenvalue of every layer; the network is not touched.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: Its module.
        options: Samples, seed, and the layers that are left out.

    Returns:
        ``<measure>/<layer>`` to value.
    """
    sharing = ranks.sharing(trainer)
    with (
        sharing.agreed("monitoring"),
        every_weight_a_layer(pl_module),
        curvature_safe(pl_module),
        preserved(pl_module),
        InFloat32(pl_module) as float32,
    ):
        data = training_batches(trainer, pl_module, options.curvature_samples, options.seed, whole=False)
        batches = prepare(
            pl_module,
            data,
            options.curvature_samples,
            use=options.use,
            loss=training_loss(pl_module),
            convert=float32.batch,
        )
        expand_uses(pl_module, batches[0])
        layers = find_layers(pl_module, batches[0], include=options.include, exclude=options.exclude)
        profile = measure(
            pl_module,
            batches,
            layers=layers,
            needs=MONITORED,
            samples=options.curvature_samples,
            seed=options.seed,
            sharing=sharing,
        )
    return {
        f"{measure}/{row.name}": value
        for row in profile.layers
        for measure in sorted(MONITORED)
        if (value := getattr(row, measure)) is not None
    }
