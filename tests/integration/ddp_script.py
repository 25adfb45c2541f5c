"""What ``test_ddp.py`` runs. Lightning starts it once more, and each of the two ranks tells what it has.

``python ddp_script.py FOLDER`` writes ``FOLDER/rank0.pt`` and ``FOLDER/rank1.pt``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lit import AtHook, Classifier, blobs, train_loader, trainer, val_loader, without_figures
from torch.utils.data import DataLoader, Subset

from lightning_caq import CurvatureQuantizationCallback, callback
from lightning_caq.bridge import calibration
from lightning_caq.bridge.calibration import training_batches
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.selection import candidate

RANKS = 2
RANK = int(os.environ.get("LOCAL_RANK", "0"))
MOVED: list[Path] | None = None


class Steady(Classifier):
    """Training does not change it: no learning rate, and batch-norm statistics that are odd but stay."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].running_mean.uniform_(-0.5, 0.5)
        self.net[1].running_var.uniform_(0.5, 2)
        self.net[1].momentum = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Watcher(AtHook):
    """Keeps the outputs of every test batch, and whether the layers were fake-quant layers then."""

    def __init__(self) -> None:
        super().__init__(
            "on_test_start", lambda t, m: {k: rounding_state(x).quantizing for k, x in quantized_modules(m).items()}
        )
        self.outputs: list[torch.Tensor] = []

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        self.outputs.append(module(batch[0]))


def shard(rank: int) -> DataLoader:
    """The training data that only one rank has."""
    return DataLoader(Subset(blobs(), range(rank, 96, RANKS)), batch_size=16)


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    defaults = {"avg_bits": 2.5, "bits": [2, 3], "calibration_samples": 32, "curvature_samples": 24}
    return CurvatureQuantizationCallback(**{**defaults, **options})


def findings(module: Any, callback: CurvatureQuantizationCallback) -> dict[str, Any]:
    plan = callback.plan
    return {
        "bits": plan.bits,
        "tensors": plan.state_dict()["tensors"],
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "profile": callback.profile.to_json(),
        "report": callback.report.to_json(),
    }


@contextmanager
def moves() -> Iterator[list[Path]]:
    """The files that this process moves to their place meanwhile; Python tells of each."""
    global MOVED
    MOVED = []
    try:
        yield MOVED
    finally:
        MOVED = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if MOVED is not None and event == "os.rename":
        MOVED.append(Path(arguments[1]))


def steady(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Quantize a network of known weights, each rank with training data of its own, and test it."""
    torch.manual_seed(0)
    module, callback, watcher = Steady(), quantizer(), Watcher()
    drawn = AtHook("on_train_end", lambda t, m: training_batches(t, m, 32, seed=0))
    t = trainer(
        folder, callbacks=[callback, watcher, drawn], logger=CSVLogger(folder), max_epochs=1,
        use_distributed_sampler=False, **kwargs,
    )  # fmt: skip
    with moves() as moved:
        t.fit(module, shard(RANK), val_loader())
    files = [path.name for path in moved]
    (loss,) = t.test(module, val_loader(), verbose=False)
    return {
        **findings(module, callback),
        "drawn": drawn.results[0],
        "files": files,
        "quantizing": watcher.results,
        "test_loss": loss["test_loss"],
        "test_outputs": torch.cat(watcher.outputs),
    }


class Split(Steady):
    """Every rank validates a part of the data; the loss, like the accuracy, is that of all of them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_acc", self.val_acc)
        self.log("val_loss", F.cross_entropy(logits, batch[1]), sync_dist=True)


def compared(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Quantize by one method, evaluate two others beside it, and study the result, on data that the ranks share out."""
    torch.manual_seed(0)
    module, callback = (
        Split(),
        quantizer(avg_bits=2.8, bits=[2, 3, 4, 5, 6, 8], compare=["uniform", "caq"], study=True, guard=False),
    )
    t = trainer(folder, callbacks=[callback], max_epochs=1, **kwargs)
    with without_figures():
        t.fit(module, train_loader(), val_loader(batch_size=8))
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    return {**findings(module, callback), "logged": logged}


def apart(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Train, with ranks that come to different plans; quantize, and train the quantized network on.

    No validation follows the last training step, so that nothing but the callback brings the batch-norm statistics of
    the ranks together.
    """
    torch.manual_seed(0)
    own = {"avg_bits": 2, "rounding": "nearest"} if RANK else {}
    module, callback = Classifier(), quantizer(evaluate=False, **own)
    before = AtHook("on_train_end", lambda t, m: {k: x.clone() for k, x in m.state_dict().items()})
    results = {}
    for name in ("first", "second"):
        module.train()
        trainer(folder, callbacks=[before, callback], limit_val_batches=0, **kwargs).fit(module, train_loader())
        results[name] = {**findings(module, callback), "before": before.results[-1]}
    return results


# Which rank fails at which place of the quantization, and the function that fails there.
BROKEN = {
    "reading": (0, calibration, "_first"),
    "rounding": (1, candidate, "round_layer"),
    "writing": (0, callback, "write"),
}


def broken(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """One rank fails where the others do not: how training ends on this rank, and what it leaves of the network."""
    results = {}
    for place, (rank, owner, function) in BROKEN.items():
        module = Classifier()
        before = AtHook("on_train_end", lambda t, m: {k: x.clone() for k, x in m.state_dict().items()})
        t = trainer(folder, callbacks=[before, quantizer()], max_epochs=1, **kwargs)
        failure = mock.patch.object(owner, function, side_effect=OSError(f"no {place}"))
        start = time.perf_counter()
        with failure if rank == RANK else nullcontext():
            try:
                t.fit(module, train_loader(), val_loader())
                end = None
            except Exception as error:
                end = (type(error).__name__, str(error))
        (weights,) = before.results
        results[place] = {
            "end": end,
            "seconds": time.perf_counter() - start,
            "types": [type(layer).__name__ for layer in module.net],
            "changed": [k for k, x in module.state_dict().items() if "weight" in k and not torch.equal(x, weights[k])],
        }
    return results


def main(folder: Path) -> None:
    sys.addaudithook(_watch)
    torch.set_num_threads(1)
    kwargs = {"devices": RANKS, "strategy": "ddp"}
    results = {
        "steady": steady(folder / "steady", **kwargs),
        "compared": compared(folder / "compared", **kwargs),
        "apart": apart(folder / "apart", **kwargs),
        "broken": broken(folder / "broken", **kwargs),
    }
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
