"""A small classifier and data for it, for every test that needs a Lightning Trainer."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import lightning.pytorch
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.bridge import outputs
from lightning_caq.bridge.packages import Callback
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.reporting.gallery import Gallery

FEATURES, CLASSES = 8, 3


def blobs(count: int = 96, seed: int = 0) -> TensorDataset:
    """Three overlapping clouds, sorted by class, as some data sets are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) * CLASSES // count
    centres = 1.5 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[labels] + torch.randn(count, FEATURES, generator=generator), labels)


def train_loader(**kwargs: Any) -> DataLoader:
    return DataLoader(blobs(), **{"batch_size": 16, "shuffle": True, **kwargs})


def val_loader(**kwargs: Any) -> DataLoader:
    return DataLoader(blobs(48, seed=1), **{"batch_size": 16, **kwargs})


def classifier(package: ModuleType = lightning.pytorch) -> type:
    """The class of the module, made for one of the two packages."""

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, CLASSES)
            )
            self.train_acc, self.val_acc = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES)
            self.register_buffer("steps", torch.zeros(()))
            self.predictions: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            self.train_acc(logits, y)
            self.steps += 1
            self.log("train_loss", loss)
            self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            logits = self(x)
            self.val_acc(logits, y)
            self.log("val_acc", self.val_acc, prog_bar=True)
            self.log("val_loss", F.cross_entropy(logits, y))

        def test_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("test_loss", F.cross_entropy(self(x), y))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    return Classifier


Classifier = classifier()


class AtHook(Callback):
    """Calls a function in one hook and keeps what it returns, every time but in the sanity check."""

    def __init__(self, hook: str, act: Callable[[Any, Any], Any]) -> None:
        self.results: list[Any] = []

        def run(trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                self.results.append(act(trainer, module))

        setattr(self, hook, run)


def trainer(folder: Any, package: ModuleType = lightning.pytorch, **kwargs: Any) -> Any:
    """A quiet Trainer on the CPU that writes into ``folder``."""
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, "log_every_n_steps": 1,
    }  # fmt: skip
    return package.Trainer(**{**defaults, **kwargs})


def without_figures() -> AbstractContextManager[Any]:
    """Runs of the callback draw nothing: figures take seconds, everything else of a tiny network a fraction of one."""
    return mock.patch.object(outputs, "draw_gallery", return_value=Gallery())


def at(
    hook: str, act: Callable[[Any, Any], Any], folder: Any, module: Any = None, loaders: Any = None, **kwargs: Any
) -> Any:
    """Fit a module, run ``act(trainer, module)`` in a hook, and return what it returned the last time."""
    probe, module = AtHook(hook, act), module or Classifier()
    trainer(folder, callbacks=[probe, *kwargs.pop("callbacks", [])], **kwargs).fit(
        module, *(loaders or (train_loader(), val_loader()))
    )
    return probe.results[-1]


def random_state() -> Any:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def snapshot(module: Any, pl_trainer: Any) -> dict[str, Any]:
    """Everything that a visitor must leave as it was."""
    return {
        "weights": {k: v.tolist() for k, v in module.state_dict().items()},
        "flags": [m.training for m in module.modules()],
        "grads": [p.grad is None for p in module.parameters()],
        "metrics": [(m.tp.tolist(), m._update_count) for m in (module.train_acc, module.val_acc)],
        "callback_metrics": {k: float(v) for k, v in pl_trainer.callback_metrics.items()},
        "logged_metrics": {k: float(v) for k, v in pl_trainer.logged_metrics.items()},
        "progress": str(pl_trainer.fit_loop.epoch_loop.val_loop.batch_progress),
        "state": (str(pl_trainer.state.fn), str(pl_trainer.state.stage)),
        "random": random_state(),
        "log": "log" in vars(module),
    }


def inputs(batches: Any) -> Tensor:
    return torch.cat([batch[0] for batch in batches])


def own_metrics(module: Any) -> dict[str, float]:
    """Accuracy and loss on the validation data, without Lightning; leaves the module in eval mode."""
    module.eval()
    with torch.inference_mode(False), torch.no_grad():
        x, y = blobs(48, seed=1).tensors
        logits = module(x)
        return {"val_acc": macro(logits.argmax(1), y), "val_loss": float(F.cross_entropy(logits, y))}


def macro(predicted: Tensor, labels: Tensor) -> float:
    return float(torch.stack([(predicted[labels == c] == c).float().mean() for c in range(3)]).mean())


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    """The callback with little work to do."""
    defaults = {"avg_bits": 3, "calibration_samples": 48, "curvature_samples": 24}
    return CurvatureQuantizationCallback(**({**defaults, **options}))


def fit(
    folder: Any, callback: Any, module: Any = None, package: ModuleType = lightning.pytorch, **kwargs: Any
) -> tuple[Any, Any]:
    """Fit a module with the callback; the module and the trainer."""
    module = module or classifier(package)()
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    pl_trainer = trainer(folder, package, callbacks=callbacks, **kwargs)
    pl_trainer.fit(module, train_loader(), val_loader())
    return module, pl_trainer


def values_per_row(weight: Tensor) -> int:
    """How many different weights each output channel holds."""
    return max(len(torch.unique(row)) for row in weight.detach())


def is_quantized(module: Any, plan: Any) -> bool:
    """Judged by the numbers alone: no channel holds more values than its bits can name."""
    return all(values_per_row(module.get_submodule(name).weight) <= 2**bits for name, bits in plan.bits.items())


def is_float(module: Any) -> bool:
    return not quantized_modules(module) and values_per_row(module.net[0].weight) == 8


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
