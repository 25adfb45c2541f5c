"""Ranks: the work divided over the processes of a distributed run, and the same network on all of them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.swap import restore_modules
from lightning_caq.utilities.sharing import ALONE, Sharing, divided


def sharing(trainer: Trainer) -> Sharing:
    """How the processes of a trainer divide the work; its strategy has brought them together already."""
    return ALONE if trainer.world_size == 1 else divided(trainer.strategy.root_device)


def share_buffers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give every rank the buffers of rank 0, as DDP does ahead of each forward pass; batch-norm has moved since."""
    if trainer.world_size == 1:
        return
    sharing(trainer).meet("buffers")
    buffers = dict(pl_module.named_buffers())
    shared = trainer.strategy.broadcast({name: buffer.cpu() for name, buffer in buffers.items()}, src=0)
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(shared[name])


def float_values(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """The float network, for ``agree``; empty where there is one process, which needs none."""
    if trainer.world_size == 1:
        return {}
    return {name: x.detach().clone() for name, x in pl_module.state_dict().items() if isinstance(x, Tensor)}


def agree(
    trainer: Trainer, pl_module: LightningModule, plan: QuantizationPlan, floats: dict[str, Tensor]
) -> QuantizationPlan:
    """Bring the plan of rank 0 into force on every rank: measurements may differ in their last digits between devices.

    Args:
        trainer: The trainer.
        pl_module: The module, quantized by ``plan``.
        plan: This rank's plan.
        floats: What ``float_values`` gave before.

    Returns:
        The plan of rank 0.
    """
    if trainer.world_size == 1:
        return plan
    sharing(trainer).meet("plan")
    state = trainer.strategy.broadcast(plan.state_dict(), src=0)
    if trainer.is_global_zero:
        return plan
    restore_modules(pl_module)
    pl_module.load_state_dict(floats, strict=False)  # extra state that is no tensor was left where it is
    plan = QuantizationPlan.from_state_dict(state)
    plan.apply(pl_module)
    return plan
