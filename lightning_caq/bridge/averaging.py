"""Averages of the weights: what is asked of Lightning's averaging callbacks, by their internals.

``WeightAveraging`` keeps a copy of the network from ``setup`` on, and pairs its parameters and buffers with those of
the network by their order alone. The copy has to be swapped whenever the network is. That is done for callbacks ahead
of ours in the list; those behind it bring a warning in ``setup``, and their average is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_caq.bridge.packages import every
from lightning_caq.bridge.trainers import later
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, swap


def averaged_networks(trainer: Trainer, callback: Any) -> list[nn.Module]:
    """The averages that callbacks keep beside the network that is trained.

    Args:
        trainer: The trainer.
        callback: Our callback.
    """
    return [other._average_model.module for other in _ahead(trainer, callback)]


def keep_grids(trainer: Trainer, callback: Any, plan: QuantizationPlan) -> None:
    """Give averages of a quantized network their grids again.

    Averaging takes in every buffer, the numbers of the grids too. It rounds, and cuts whole numbers, so that scales
    drift and bits are lost.

    Args:
        trainer: The trainer, inside a hook.
        callback: Our callback.
        plan: The plan that is in force on the network.
    """
    for network in averaged_networks(trainer, callback):
        if quantized_modules(network):
            swap(network, plan.grids(), plan.input_grids())


@contextmanager
def averages_settled(trainer: Trainer, callback: Any, pl_module: LightningModule) -> Iterator[None]:
    """Let the network hold its averaged weights, and let go of the averages once that is the network to keep.

    ``WeightAveraging`` keeps its average after ``fit``. It would put it in the place of the quantized network in every
    later ``validate`` and every checkpoint. A callback behind ours still copies its average into the network when
    training ends; it gets the network itself for one, so that nothing changes.

    Args:
        trainer: The trainer, inside a hook.
        callback: Our callback.
        pl_module: Its module.
    """
    for other in _ahead(trainer, callback):
        other._copy_average_to_current(pl_module)
    yield
    for other in _averaging(trainer):
        other._average_model.module = pl_module
    for other in _ahead(trainer, callback):
        other._average_model = None


def _averaging(trainer: Any) -> list[Any]:
    kinds = every("callbacks", "WeightAveraging")
    return [x for x in trainer.callbacks if isinstance(x, kinds) and x._average_model is not None]


def _ahead(trainer: Trainer, callback: Any) -> list[Any]:
    behind = later(trainer, callback)
    return [x for x in _averaging(trainer) if x not in behind]
