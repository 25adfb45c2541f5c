"""The loss of any module, without its side effects."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_caq.bridge.packages import every
from lightning_caq.bridge.undisturbed import undisturbed
from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.objective import Loss
from lightning_caq.utilities.structures import describe

_MODULES = every("core", "LightningModule")


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


def training_loss(pl_module: LightningModule, loss_fn: Loss | None = None) -> Loss | None:
    """The module's loss if there is one, to see how it runs the module; ``None`` where there is none to be called."""
    try:
        return quiet_loss(pl_module, loss_fn)
    except OptionError:
        return None


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
        for attributes, shadowing in zip(shadowed, before, strict=True):
            for name in names:
                del attributes[name]
            attributes.update(shadowing)
