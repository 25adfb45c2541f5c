"""What ``test_spawn.py`` runs: a fit whose two processes Lightning spawns, and what the main process has afterwards.

``python spawn_script.py FOLDER`` writes ``FOLDER/main.pt``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lit import CLASSES, FEATURES, blobs, train_loader, trainer
from torch import Tensor, nn

from lightning_caq import CurvatureQuantizationCallback


class Spawned(LightningModule):
    """A class with a name that can be imported, as spawned processes need it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES))

    def on_fit_end(self) -> None:
        # Threads of torch's process groups may let go of their last tensors while the interpreter ends, which then
        # aborts a spawned process now and then. It has handed over all it had by then: it leaves at once.
        if multiprocessing.parent_process() is not None:
            atexit.register(os._exit, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    callback = CurvatureQuantizationCallback(
        avg_bits=3,
        calibration_samples=24,
        curvature_samples=8,
        eigenpairs=4,
        guard=False,
        compare=[],
        evaluate=False,
    )
    module = Spawned()
    settings = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False}
    t = trainer(folder, callbacks=[callback], max_epochs=1, **settings)
    t.fit(module, train_loader())
    with torch.no_grad():
        outputs = module.eval()(blobs(48, seed=1).tensors[0])
    state = {name: x for name, x in module.state_dict().items() if isinstance(x, torch.Tensor)}
    kinds = [type(layer).__name__ for layer in module.net]
    torch.save({"plan": callback.plan, "kinds": kinds, "outputs": outputs, "state": state}, folder / "main.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
