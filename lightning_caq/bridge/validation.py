"""A validation loop that can be run inside a hook and that nobody else notices."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_caq.bridge.recording import Recorder
from lightning_caq.bridge.undisturbed import own_iterators, replaced, undisturbed
from lightning_caq.scores import Score
from lightning_caq.utilities.isolation import seeded

Validation = Callable[[nn.Module], dict[str, Score]]


def isolated_validation(trainer: Trainer, pl_module: LightningModule) -> Validation | None:
    """A validation loop that can be run any number of times inside a hook, and that nobody else notices.

    The loop is Lightning's own, on the loaders that the user's validation reads, limits included, and every run starts
    from the same random state. Callbacks and loggers do not take part; ``callback_metrics``, the state of metrics and
    of the live loop stay as they are. It works inside ``fit`` and inside ``validate``.

    Args:
        trainer: The trainer, inside a hook.
        pl_module: Its module.

    Returns:
        A function that validates the module as it then is, and returns the metrics it logs by name, each with what its
        standard error is taken from; ``None``, with a warning, where there is nothing to validate on.
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

    def validate(model: nn.Module) -> dict[str, Score]:
        recorder = Recorder(pl_module, sum(live.max_batches) if live.max_batches else 1)
        with warnings.catch_warnings(), undisturbed(pl_module), own_iterators(combined.flattened), ExitStack() as stack:
            # Lightning's own; it would come again with every network.
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            loop = type(live)(trainer, live._trainer_fn, live._stage, verbose=False, inference_mode=False)
            loop.setup_data = lambda: None  # the live loop has done that; the loaders are shared, no iterators
            loop._combined_loader = type(combined)(combined.iterables, combined._mode)
            loop._max_batches = live._max_batches
            stack.enter_context(_alone(trainer, holder, slot, loop, recorder))
            stack.enter_context(recorder.watching())
            try:
                loop.run()
                return recorder.scores(trainer, _figures(trainer._logger_connector._callback_metrics))
            finally:
                loop.teardown()

    return validate


@contextmanager
def _alone(trainer: Any, holder: Any, slot: str, loop: Any, recorder: Recorder) -> Iterator[None]:
    """Let ``loop`` be the validation loop for a while, with nobody listening but a recorder."""
    stage, connector = trainer.state.stage, trainer._logger_connector
    with ExitStack() as stack:
        stack.callback(setattr, trainer.state, "stage", stage)
        replaced(stack, holder, slot, loop)
        replaced(stack, trainer, "callbacks", [recorder])
        replaced(stack, trainer, "_logger_connector", type(connector)(trainer))
        if hasattr(trainer, "_last_val_time"):  # the clock of val_check_interval, where it is a time
            replaced(stack, trainer, "_last_val_time", trainer._last_val_time)
        trainer.validating = True
        yield


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Logged numbers by name; a metric logged by step and by epoch counts once, with its value of the epoch."""
    names = [key.partition("/dataloader_idx_") for key in metrics]
    forks = {name + fork + mark + index for name, mark, index in names for fork in ("_step", "_epoch")}
    return {k: float(v) for k, v in metrics.items() if k not in forks and isinstance(v, (Tensor, float, int))}
