"""The bridge to Lightning; but for ``averaging``, the only file that touches its internals.

What a callback needs and Lightning has no public way to give: training data that can be read without disturbing the
live loader, the loss of any module without its side effects, and a validation loop that nobody else notices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric

from lightning_caq._compat import every
from lightning_caq.batches import batch_size, check_model_takes, describe
from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.isolation import seeded
from lightning_caq.objective import Loss
from lightning_caq.ranks import sharing

Validation = Callable[[nn.Module], dict[str, float]]

_MODULES = every("core", "LightningModule")


# ---------------------------------------------------------------------------------------------- calibration batches


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
        fresh = tree_map(lambda loader: _drawn(loader, samples, seed), loaders)
        with _own_iterators(CombinedLoader(fresh).flattened):
            batches = _first(_batches(fresh, mode), samples)
            sharing(trainer).meet("calibration batches")
            batches = trainer.strategy.broadcast(batches, src=0)
        batches = [_to_device(trainer, pl_module, batch) for batch in batches]
        return batches if whole or not isinstance(loaders, (dict, list, tuple)) else _taken(pl_module, batches)


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


def _drawn(loader: Any, samples: int, seed: int) -> Any:
    """A loader of randomly drawn items if ``loader`` reads a whole map-style dataset, otherwise ``loader`` itself."""
    if not _reads_whole_dataset(loader):
        return loader
    count = len(loader.dataset)
    drawn = np.random.default_rng(seed).choice(count, min(samples, count), replace=False)
    subset = Subset(loader.dataset, drawn.tolist())
    return DataLoader(subset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def _reads_whole_dataset(loader: Any) -> bool:
    """Whether drawing from the dataset gives what the loader gives; a custom sampler may pick a part, or sort it."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
        and isinstance(loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler))
        and isinstance(loader.batch_sampler, BatchSampler)
        and type(loader.batch_sampler).__iter__ is BatchSampler.__iter__
    )


def _batches(loaders: Any, mode: Any) -> Iterator[Any]:
    single = not isinstance(loaders, (dict, list, tuple))
    for batch, _, _ in CombinedLoader(loaders, "sequential" if single else mode):
        yield batch


def _first(batches: Iterable[Any], samples: int) -> list[Any]:
    """The first batches that together hold ``samples`` samples."""
    kept: list[Any] = []
    for batch in batches:
        kept.append(batch)
        samples -= batch_size(batch)
        if samples <= 0:
            break
    return kept


def _taken(model: nn.Module, collections: list[Any]) -> list[Any]:
    """Collections of batches if the network takes them, else the batches in them."""
    try:
        check_model_takes(model, collections[0])
    except CalibrationError:
        return [batch for each in collections for batch in (each.values() if isinstance(each, dict) else each)]
    return collections


def _to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


# ------------------------------------------------------------------------------------------------------- quiet loss


def quiet_loss(pl_module: LightningModule, loss_fn: Loss | None = None) -> Loss:
    """The module's loss on one batch, as a function without side effects.

    The loss is ``loss_fn(module, batch)`` if given, else the module's own ``curvature_loss(batch)`` if it has one, else
    what ``training_step`` returns. Whichever it is, nothing that it logs is kept, and metric states, buffers, train and
    eval flags and random states are put back after each call. Calls are repeatable: each starts from the same seed.

    Args:
        pl_module: The module.
        loss_fn: The user's own loss.

    Returns:
        A function from the module and a batch to a scalar with a graph.

    Raises:
        OptionError: If only ``training_step`` is left and it cannot be called from outside the training loop.
    """
    route = loss_fn or _own_loss(pl_module)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with undisturbed(pl_module), _silent_log(pl_module):
            return _scalar(route(model, batch))

    return loss


_REMEDY = "give loss_fn=, a function of (module, batch) that returns the loss, or define curvature_loss(self, batch)"


def _own_loss(pl_module: LightningModule) -> Loss:
    if callable(getattr(pl_module, "curvature_loss", None)):
        return lambda model, batch: model.curvature_loss(batch)  # type: ignore[operator]
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise OptionError(
            f"objective='task' needs a loss, but {name} optimises by hand, so its training_step would change the "
            f"weights; {_REMEDY}, or choose objective='distill'."
        )
    parameters = list(inspect.signature(pl_module.training_step).parameters)
    if "dataloader_iter" in parameters:
        raise OptionError(
            f"objective='task' needs a loss, but {name}.training_step takes dataloader_iter instead of a batch; "
            f"{_REMEDY}, or choose objective='distill'."
        )
    indices = (0,) * min(max(len(parameters) - 1, 0), 2)  # batch_idx and dataloader_idx, as far as they are taken
    return lambda model, batch: model.training_step(batch, *indices)  # type: ignore[operator]


def _scalar(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = "None" if loss is None else describe(loss)
        raise CalibrationError(f"The loss of a batch must be a tensor with one number, got {given}; {_REMEDY}.")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise CalibrationError(f"The loss of a calibration batch does not depend on the weights; {_REMEDY}.")
    return loss.reshape(())


@contextmanager
def _silent_log(pl_module: LightningModule) -> Iterator[None]:
    """Shadow ``log`` and ``log_dict``: they are forbidden in some hooks and would pollute the metrics in others."""
    shadowed = [vars(m) for m in pl_module.modules() if isinstance(m, _MODULES)]
    names = ("log", "log_dict")
    before = [{name: attributes[name] for name in names if name in attributes} for attributes in shadowed]
    try:
        for attributes in shadowed:
            attributes.update(dict.fromkeys(names, lambda *args, **kwargs: None))
        yield
    finally:
        for attributes, own in zip(shadowed, before, strict=True):
            for name in names:
                del attributes[name]
            attributes.update(own)


# ---------------------------------------------------------------------------------------------- isolated validation


def isolated_validation(trainer: Trainer, pl_module: LightningModule) -> Validation | None:
    """A validation loop that can be run any number of times inside a hook, and that nobody else notices.

    The loop is Lightning's own, on the loaders that the user's validation reads, limits included, and every run starts
    from the same random state. Callbacks and loggers do not take part; ``callback_metrics``, the state of metrics and
    of the live loop stay as they are. It works inside ``fit`` and inside ``validate``.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: Its module.

    Returns:
        A function that validates the module as it then is, and returns the metrics it logs by name; ``None``, with a
        warning, where there is nothing to validate on.
    """
    validating = trainer.state.fn == "validate"
    holder, slot = (trainer, "validate_loop") if validating else (trainer.fit_loop.epoch_loop, "val_loop")
    live = getattr(holder, slot)
    if not validating and trainer.enable_validation and live._combined_loader is None:
        with seeded():
            live.setup_data()  # validation has not run yet, for instance because of check_val_every_n_epoch
    combined = live._combined_loader
    if combined is None or live.skip:
        rank_zero_warn(
            "caq: there is no validation data (no val_dataloader, no validation_step, or limit_val_batches=0), so "
            "float and quantized metrics are not compared; pass evaluate=False if that is intended."
        )
        return None

    def validate(model: nn.Module) -> dict[str, float]:
        loop = type(live)(trainer, live._trainer_fn, live._stage, verbose=False, inference_mode=False)
        loop.setup_data = lambda: None  # the live loop has done that; the loaders are shared, their iterators are not
        loop._combined_loader = type(combined)(combined.iterables, combined._mode)
        loop._max_batches = live._max_batches
        with undisturbed(pl_module), _own_iterators(combined.flattened), _alone(trainer, holder, slot, loop):
            try:
                loop.run()
            finally:
                loop.teardown()
            return _figures(trainer._logger_connector._callback_metrics)

    return validate


@contextmanager
def _alone(trainer: Any, holder: Any, slot: str, loop: Any) -> Iterator[None]:
    """Let ``loop`` be the validation loop for a while, with nobody listening."""
    stage, connector = trainer.state.stage, trainer._logger_connector
    with ExitStack() as stack:
        stack.callback(setattr, trainer.state, "stage", stage)
        _replaced(stack, holder, slot, loop)
        _replaced(stack, trainer, "callbacks", [])
        _replaced(stack, trainer, "_logger_connector", type(connector)(trainer))
        if hasattr(trainer, "_last_val_time"):  # the clock of val_check_interval, where it is a time
            _replaced(stack, trainer, "_last_val_time", trainer._last_val_time)
        trainer.validating = True
        yield


def _replaced(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged numbers by name; a metric logged by step and by epoch counts once, with its value of the epoch."""
    names = [key.partition("/dataloader_idx_") for key in metrics]
    forks = {name + fork + mark + index for name, mark, index in names for fork in ("_step", "_epoch")}
    return {k: float(v) for k, v in metrics.items() if k not in forks and isinstance(v, (Tensor, float, int))}


# ---------------------------------------------------------------------------------------------- leaving no trace


@contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Run steps of a module and leave its metrics, buffers, flags, loggers and the random states as they were.

    Metrics and buffers work on copies for a while; the originals come back untouched, so that a graph built inside
    stays valid.

    Args:
        pl_module: The module; its weights are not looked after.
    """
    modules = list(pl_module.modules())
    flags = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    metrics = {module: dict(vars(module)) for module in modules if isinstance(module, Metric)}
    with ExitStack() as stack:
        stack.enter_context(seeded())
        if pl_module._trainer is not None:
            # A logger that accepts every call, for steps that draw pictures on self.logger.experiment.
            _replaced(stack, pl_module._trainer, "loggers", [DummyLogger() for _ in pl_module._trainer.loggers])
        try:
            for module, own in zip(modules, buffers, strict=True):
                module._buffers.update({name: _copy(value) for name, value in own.items()})
            for metric in metrics:
                vars(metric).update({name: _copy(getattr(metric, name)) for name in metric._defaults})
            yield
        finally:
            for metric, attributes in metrics.items():
                vars(metric).clear()
                vars(metric).update(attributes)
            for module, own, training in zip(modules, buffers, flags, strict=True):
                module._buffers.update(own)
                module.training = training


def _copy(state: Any) -> Any:
    return state.detach().clone() if isinstance(state, Tensor) else list(state) if isinstance(state, list) else state


@contextmanager
def _own_iterators(loaders: Iterable[Any]) -> Iterator[None]:
    """Keep the live iterators of loaders with persistent workers: a second ``iter`` would rewind them."""
    live = [(loader, loader._iterator) for loader in loaders if isinstance(loader, DataLoader)]
    try:
        for loader, _ in live:
            loader._iterator = None
        yield
    finally:
        for loader, iterator in live:
            loader._iterator = iterator
