"""Monitoring: the curvature of a network while it trains."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_caq import bridge, ranks
from lightning_caq.contexts import curvature_safe
from lightning_caq.isolation import preserved
from lightning_caq.layers import find_layers
from lightning_caq.measures.measure import measure
from lightning_caq.options import QuantizationOptions

MONITORED = frozenset({"kappa", "lipschitz", "trace", "top_eigenvalue"})


def training_figures(trainer: Trainer, pl_module: LightningModule, options: QuantizationOptions) -> dict[str, float]:
    """Measure κ, L, trace and top eigenvalue of every layer; the network is not touched.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: Its module.
        options: Samples, seed, and the layers that are left out.

    Returns:
        ``caq/training/<measure>/<layer>`` to value.
    """
    sharing = ranks.sharing(trainer)
    with curvature_safe(pl_module), preserved(pl_module), sharing.agreed("monitoring"):
        batches = bridge.training_batches(trainer, pl_module, options.curvature_samples, options.seed, whole=False)
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
        f"caq/training/{measure}/{row.name}": value
        for row in profile.layers
        for measure in sorted(MONITORED)
        if (value := getattr(row, measure)) is not None
    }
