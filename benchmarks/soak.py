"""Fit, quantize, validate, over and over in one process: does anything grow?

``python benchmarks/soak.py --cycles 50 --json soak.json`` prints, for every tenth cycle, the memory of the process, its
threads and open files, the tensors and hooks that are alive, and exits with 1 if the second half of the cycles grew.

``python benchmarks/soak.py --layers 1000`` takes one network of that many small layers through instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq import CurvatureQuantizationCallback

FEATURES, CLASSES = 16, 4
MOST_MEGABYTES = 0.5  # a cycle, in the second half: allocators and caches settle in the first


class Net(lightning.pytorch.LightningModule):
    """A small classifier; ``layers`` of more than 3 are residual, so that depth does no harm to training."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.blocks = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(layers - 2))
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        x = self.norm(self.first(x)).relu()
        for block in self.blocks:
            x = x + block(x).relu() / len(self.blocks)
        return self.last(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross-entropy."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the cross-entropy."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(count: int, seed: int) -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draws)
    inputs = torch.randn(count, FEATURES, generator=draws) + 2 * F.one_hot(labels, FEATURES)
    return DataLoader(TensorDataset(inputs, labels), batch_size=64)


def cycle(folder: str, layers: int, **options: Any) -> CurvatureQuantizationCallback:
    """One fit with the callback, with files and figures, and a validation of the quantized network."""
    callback = CurvatureQuantizationCallback(avg_bits=3, **options)
    trainer = lightning.pytorch.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=CSVLogger(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Net(layers)
    trainer.fit(module, loader(256, 0), loader(128, 1))
    trainer.validate(module, loader(128, 1), verbose=False)
    return callback


def resident_megabytes() -> float:
    """Memory of this process that is in use now, in MB; the most so far where the system does not tell."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def census() -> dict[str, float]:
    """What is alive in this process."""
    gc.collect()
    alive = [x for x in gc.get_objects() if issubclass(type(x), (torch.Tensor, nn.Module))]
    modules = [x for x in alive if issubclass(type(x), nn.Module)]
    files = Path("/proc/self/fd")
    return {
        "MB": round(resident_megabytes(), 1),
        "threads": threading.active_count(),
        "open files": len(os.listdir(files)) if files.exists() else 0,
        "tensors": len(alive) - len(modules),
        "modules": len(modules),
        "hooks": sum(len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks) for x in modules),
    }


def soak(cycles: int) -> dict[str, Any]:
    """Run the cycles and take a census after each."""
    seen = []
    for number in range(1, cycles + 1):
        with tempfile.TemporaryDirectory() as folder:
            cycle(folder, 3, calibration_samples=64, curvature_samples=32, eigenpairs=8)
        seen.append(census())
        if number % 10 == 0 or number in (1, cycles):
            print(f"cycle {number:3d}  " + "  ".join(f"{name} {value:g}" for name, value in seen[-1].items()))
    middle = seen[len(seen) // 2]
    growth = {name: round(seen[-1][name] - middle[name], 1) for name in middle}
    grown = [name for name, more in growth.items() if more > (MOST_MEGABYTES * cycles / 2 if name == "MB" else 0)]
    print("growth in the second half: " + ", ".join(f"{name} {more:+g}" for name, more in growth.items()))
    return {"cycles": seen, "growth": growth, "grown": grown}


def deep(layers: int) -> dict[str, Any]:
    """Take one network of many layers through, and tell the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        callback = cycle(folder, layers, calibration_samples=64, curvature_samples=32, eigenpairs=16)
        seconds = time.perf_counter() - start
        figures = sorted(path.name for path in Path(folder).rglob("*.png"))
    assert callback.plan is not None
    assert callback.report is not None
    parts = dict(callback.report.seconds)
    parts["fit, files and figures"] = seconds - sum(parts.values())
    quantized, memory = len(callback.plan.bits), resident_megabytes()
    print(f"{quantized} layers: {seconds:.0f} s in all, {len(figures)} figures, {memory:.0f} MB")
    for part, taken in parts.items():
        print(f"  {part}: {taken:.1f} s")
    return {"layers": layers, "seconds": seconds, "parts": parts, "MB": memory, "figures": figures}


def main() -> int:
    """Run, print, and say by the exit status whether anything grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--layers", type=int, help="take one network of so many layers through instead")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    found = deep(arguments.layers) if arguments.layers else soak(arguments.cycles)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found.get("grown") else 0


if __name__ == "__main__":
    sys.exit(main())
