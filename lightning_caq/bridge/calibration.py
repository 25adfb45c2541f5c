"""Calibration data: training batches, read without disturbing the live loader."""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_caq.bridge.packages import every
from lightning_caq.bridge.ranks import sharing
from lightning_caq.bridge.undisturbed import own_iterators
from lightning_caq.network.batches import batch_size
from lightning_caq.network.drawn import drawn
from lightning_caq.network.prepare import takes
from lightning_caq.utilities.isolation import seeded
from lightning_caq.utilities.structures import children


def training_batches(
    trainer: Trainer, pl_module: LightningModule, samples: int, seed: int, *, whole: bool = True
) -> list[Any]:
    """Read training data afresh, on the device and in the precision of the module.

    A plain loader over a map-style dataset is not read from its start, where sorted data would show one class only:
    ``samples`` different items are drawn at random. Any other loader is iterated as it is. The global random states
    and the loader that training reads are left alone, and every rank gets the batches of rank 0.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: The module being trained or validated.
        samples: How many samples are wanted; fewer come back if there are no more.
        seed: Seed of the draw and of the data's own random transforms.
        whole: Whether collections of batches, as training reads them from several loaders side by side, stay together
            as ``training_step`` needs them; otherwise each batch comes alone unless ``forward`` takes the collection.

    Returns:
        The batches, as the module's ``training_step`` would get them.
    """
    with seeded(seed):
        loaders, mode = _training_loaders(trainer, pl_module)
        fresh = tree_map(lambda loader: drawn(loader, samples, seed), loaders)
        with own_iterators(CombinedLoader(fresh).flattened):
            batches = _first(_batches(fresh, mode), samples)
            sharing(trainer).meet("calibration batches")
            batches = trainer.strategy.broadcast(batches, src=0)
        batches = [_to_device(trainer, pl_module, batch) for batch in batches]
        return batches if whole or not isinstance(loaders, (dict, list, tuple)) else as_taken(pl_module, batches)


def _training_loaders(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, str]:
    """The training loader, or a collection and how it is combined; the validation data if there is none."""
    live = trainer.fit_loop._combined_loader
    if live is not None:
        return live.iterables, live._mode
    Source = type(trainer.fit_loop._data_source)
    reason = "no training data is known"
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        source = Source(owner, "train_dataloader")
        if owner is not None and source.is_defined():
            try:
                return _loaders_and_mode(source.dataloader(), "max_size_cycle")
            except Exception as error:  # a data module whose setup("fit") has not run fails in ways of its own
                reason = f"{type(owner).__name__}.train_dataloader() raised {type(error).__name__}: {error}"
    rank_zero_warn(
        f"caq: calibrating on the validation data, because {reason}. The metrics of the quantized network are then "
        "slightly optimistic; pass a module or data module with a train_dataloader to avoid it."
    )
    combined = trainer.validate_loop._combined_loader
    assert combined is not None
    return combined.iterables, combined._mode


def _loaders_and_mode(loaders: Any, mode: str) -> tuple[Any, str]:
    combined = isinstance(loaders, every("utilities", "CombinedLoader"))
    return (loaders.iterables, loaders._mode) if combined else (loaders, mode)


def _batches(loaders: Any, mode: Any) -> Iterator[Any]:
    single = not isinstance(loaders, (dict, list, tuple))
    for batch, _, _ in CombinedLoader(loaders, "sequential" if single else mode):
        yield batch


def _first(batches: Iterable[Any], samples: int) -> list[Any]:
    """The first batches that together hold ``samples`` samples."""
    kept: list[Any] = []
    for batch in batches:
        kept.append(batch)
        samples -= max(batch_size(batch), 1)
        if samples <= 0:
            break
    return kept


def as_taken(model: nn.Module, batches: list[Any]) -> list[Any]:
    """Batches as the network takes them: where these are collections of batches that it does not take, what they hold.

    Args:
        model: The network.
        batches: Batches, or collections of them, as training reads several loaders side by side.
    """
    first = batches[0]
    several = isinstance(first, (dict, list, tuple)) and not any(isinstance(x, Tensor) for _, x in children(first))
    if not several or takes(model, first):
        return batches
    return [batch for collection in batches for _, batch in children(collection)]


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
