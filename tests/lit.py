"""A small classifier and data for it, for every test that needs a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any
from unittest import mock

import lightning.pytorch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_caq import outputs
from lightning_caq._compat import Callback
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
