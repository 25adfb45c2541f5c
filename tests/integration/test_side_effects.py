"""What the callback must not be noticed in: one case each, on a fit with it beside the same fit without it."""

from __future__ import annotations

import csv
import gc
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from every import every
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lit import AtHook, Classifier, train_loader, trainer, val_loader, without_figures
from torch import nn

from lightning_caq import CurvatureQuantizationCallback

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Observed(Classifier):
    """Two optimizers' worth of things to disturb: a frozen batch-norm, a metric, a buffer, a schedule."""

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    return CurvatureQuantizationCallback(
        avg_bits=3, objective="task", batchnorm="keep", calibration_samples=24, curvature_samples=8, eigenpairs=4,
        guard=False, compare=[], **options,
    )  # fmt: skip


def optimizer_state(t: Any) -> list[Any]:
    (optimizer,) = t.optimizers
    (schedule,) = t.lr_scheduler_configs
    params = [id(p) for group in optimizer.param_groups for p in group["params"]]
    moments = [v.flatten().tolist() for s in optimizer.state.values() for v in s.values()]
    return [params, moments, optimizer.param_groups[0]["lr"], schedule.scheduler.state_dict()]


# What is looked at right before the work and right after it.
LOOKS = {
    "random states": lambda t, m: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
    "buffers": lambda t, m: {k: v.tolist() for k, v in m.named_buffers() if not k.endswith(("scale", "zero_point"))},
    "gradients": lambda t, m: [p.grad is None for p in m.parameters()],
    "what needs a gradient": lambda t, m: [p.requires_grad for p in m.parameters()],
    "gradient modes": lambda t, m: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "train and eval flags": lambda t, m: [x.training for x in m.modules()],
    "torchmetrics": lambda t, m: [(x.tp.tolist(), x._update_count, x._computed) for x in (m.train_acc, m.val_acc)],
    "callback_metrics": lambda t, m: {k: float(v) for k, v in t.callback_metrics.items()},
    "logged_metrics": lambda t, m: {k: float(v) for k, v in t.logged_metrics.items()},
    "progress bar": lambda t, m: ({k: float(v) for k, v in t.progress_bar_metrics.items()}, bar(t)),
    "progress": lambda t, m: (str(t.fit_loop.state_dict()), t.global_step, t.current_epoch),
    "optimizers and schedules": lambda t, m: optimizer_state(t),
    "log": lambda t, m: [name for name in ("log", "log_dict") if name in vars(m)],
    "hooks of modules": lambda t, m: [[len(getattr(x, name)) for name in HOOKS] for x in m.modules()],
    "hooks of parameters": lambda t, m: [p._backward_hooks for p in m.parameters()],
    "parameters": lambda t, m: [(name, id(p), p.dtype, p.stride()) for name, p in m.named_parameters()],
    "trainer": lambda t, m: (t.state.fn, t.state.stage, [id(x) for x in t.callbacks], [id(x) for x in t.loggers]),
    "threads": lambda t, m: sorted(thread.name for thread in threading.enumerate()),
}


def bar(t: Any) -> list[Any]:
    bars = t.progress_bar_callback
    return [(x.n, x.total, x.desc) for x in (bars._train_progress_bar, bars._val_progress_bar) if x is not None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The looks before and after the work, and both fits' folders."""
    looks: dict[str, Any] = {}

    class Watched(CurvatureQuantizationCallback):
        def on_train_end(self, t: Any, m: Any) -> None:
            before = {name: look(t, m) for name, look in LOOKS.items()}
            super().on_train_end(t, m)
            looks.update({name: (before[name], look(t, m)) for name, look in LOOKS.items()})

    folders = {}
    for name in ("with", "without"):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        module, extra = Observed(), []
        if name == "with":
            watched = Watched(avg_bits=3)
            watched.__dict__.update(quantizer(monitor_every_n_epochs=1).__dict__)
            extra = [watched]
        keep = ModelCheckpoint(folder / "checkpoints", "kept", monitor="val_loss", mode="min")
        callbacks = [*extra, keep, TQDMProgressBar(refresh_rate=0)]
        settings = {"logger": CSVLogger(folder), "enable_checkpointing": True, "enable_progress_bar": True}
        with without_figures():
            trainer(folder, callbacks=callbacks, **settings).fit(module, train_loader(), val_loader())
    return looks, folders


@every("what", LOOKS)
def test_the_work_leaves_alone(runs, what):
    before, after = runs[0][what]
    assert after == before


def rows(folder: Any) -> list[dict[str, str]]:
    """What was logged, without our own columns and the rows that hold nothing else."""
    with next(folder.rglob("metrics.csv")).open() as file:
        logged = [{k: v for k, v in row.items() if v and not k.startswith("caq/")} for row in csv.DictReader(file)]
    return [row for row in logged if set(row) - {"step", "epoch"}]


def test_training_logs_the_same_numbers(runs):
    """Monitoring measured in every epoch, and the random numbers, data and statistics of training went on as ever."""
    ours, theirs = rows(runs[1]["with"]), rows(runs[1]["without"])
    assert any("train_loss" in row for row in ours)
    assert ours == theirs


def test_checkpoints_of_training_hold_the_same_weights(runs):
    ours, theirs = (torch.load(folder / "checkpoints" / "kept.ckpt", weights_only=True) for folder in runs[1].values())
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(x, theirs["state_dict"][name]) for name, x in ours["state_dict"].items())
    assert {key for key in ours["callbacks"] if "Quantization" in key} == set()


def test_nothing_is_kept_in_memory(tmp_path, no_figures):
    """Once the user lets go of a network and its trainer, what came of the quantization holds none of them."""

    def run() -> tuple[list[Any], Any]:
        module, loader, callback = Classifier(), train_loader(), quantizer()
        t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
        t.fit(module, loader, val_loader())
        held = module, module.net[0].weight, t, loader, callback  # Lightning binds log to callbacks, so they hold all
        return [weakref.ref(x) for x in held], (callback.plan, callback.profile, callback.report)

    alive, results = run()
    gc.collect()
    assert [x() for x in alive] == [None] * 5
    assert None not in results


def test_no_tensor_is_left_behind(tmp_path, no_figures):
    """A second run in the same process leaves as many tensors as the first."""
    counts = []
    for _ in range(3):
        callback = quantizer()
        trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(Classifier(), train_loader(), val_loader())
        del callback
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] == counts[2]


def test_a_user_hook_on_a_layer_goes_on_working(tmp_path, no_figures):
    seen: list[Any] = []
    module = Classifier()
    module.net[0].register_forward_hook(lambda layer, args, output: seen.append(type(layer).__name__))
    clear = AtHook("on_fit_end", lambda t, m: seen.clear())
    t = trainer(tmp_path, callbacks=[quantizer(), clear], max_epochs=1)
    t.fit(module, train_loader(), val_loader())
    t.predict(module, val_loader())
    assert seen == ["FakeQuantLinear"] * 3
    assert isinstance(module.net[0], nn.Linear)
