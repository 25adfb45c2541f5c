"""Leaving no trace: steps of a module that change neither its metrics, its buffers, nor its loaders."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_caq.utilities.isolation import seeded

Validation = Callable[[nn.Module], dict[str, float]]


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
            replaced(stack, pl_module._trainer, "loggers", [DummyLogger() for _ in pl_module._trainer.loggers])
        try:
            for module, original in zip(modules, buffers, strict=True):
                module._buffers.update({name: _copy(value) for name, value in original.items()})
            for metric in metrics:
                vars(metric).update({name: _copy(getattr(metric, name)) for name in metric._defaults})
            yield
        finally:
            for metric, attributes in metrics.items():
                vars(metric).clear()
                vars(metric).update(attributes)
            for module, original, training in zip(modules, buffers, flags, strict=True):
                module._buffers.update(original)
                module.training = training


def _copy(state: Any) -> Any:
    return state.detach().clone() if isinstance(state, Tensor) else list(state) if isinstance(state, list) else state


@contextmanager
def own_iterators(loaders: Iterable[Any]) -> Iterator[None]:
    """Keep the live iterators of loaders with persistent workers: a second ``iter`` would rewind them."""
    live = [(loader, loader._iterator) for loader in loaders if isinstance(loader, DataLoader)]
    try:
        for loader, _ in live:
            loader._iterator = None
        yield
    finally:
        for loader, iterator in live:
            loader._iterator = iterator


def replaced(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack is closed."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
