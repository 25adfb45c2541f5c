"""What a report prints under "How to repeat it" is run, for every budget and every way to start a run."""

from __future__ import annotations

import copy
import html
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from every import every
from lightning.pytorch.cli import LightningCLI
from lit import Classifier, blobs, fit, quantizer, train_loader, val_loader
from torch import nn

from lightning_caq import CurvatureQuantizationCallback, quantize
from lightning_caq.cli import main
from lightning_caq.plan import QuantizationPlan

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    # LightningCLI's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]
LESS = {"calibration_samples": 48, "curvature_samples": 16, "compare": (), "guard": False}
BUDGETS: dict[str, dict[str, Any]] = {
    "avg_bits": {"avg_bits": 3},
    "ratio": {"ratio": 4.0, "method": "caq"},
    "bops": {"bops": 4e-6, "bits": (2, 4), "activation_bits": 4},  # a number that JSON writes without a point
    "both": {"avg_bits": 5, "bops": 8e-6, "activation_bits": "mixed"},
    "error": {"error": 0.3, "method": "caq_bound"},
    "max_bytes": {"max_bytes": 1350, "coding": "entropy"},
    "max_drop": {"max_drop": 0.3, "monitor": "val_acc", "max_evaluations": 2},
    "task": {"avg_bits": 3, "objective": "task"},
}


def texts(page: Path) -> list[str]:
    part = page.read_text(encoding="utf-8").partition("How to repeat it")[2]
    return [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", part, re.DOTALL)]


def same(a: QuantizationPlan, b: QuantizationPlan) -> bool:
    return a.bits == b.bits and all(torch.equal(x.codes, y.codes) for x, y in zip(a.layers, b.layers, strict=True))


def accuracy(model: nn.Module) -> dict[str, float]:
    x, y = blobs(48, seed=1).tensors
    return {"val_acc": float((model.eval()(x).argmax(1) == y).float().mean())}


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@every("budget", BUDGETS)
def test_a_call_of_quantize(tmp_path, budget):
    model = Classifier().net.eval()
    batches, before = [blobs().tensors], copy.deepcopy(model)
    needed = {"evaluate": accuracy} if budget == "max_drop" else {"loss_fn": loss} if budget == "task" else {}
    result = quantize(model, batches, **BUDGETS[budget], **LESS, **needed)
    _, _, function = texts(result.to_html(tmp_path / "report.html"))  # no profile beside it to allocate by
    scope = {"model": before, "batches": batches, **needed}
    exec(function, scope)
    assert same(scope["result"].plan, result.plan)


def fitted(folder: Path, callback: CurvatureQuantizationCallback) -> None:
    torch.manual_seed(0)
    fit(folder, callback, max_epochs=1)


@every("budget", BUDGETS)
def test_a_callback_in_code_and_in_yaml(tmp_path, budget):
    first = quantizer(**{"avg_bits": None, **BUDGETS[budget], **LESS})
    fitted(tmp_path / budget, first)
    text, code, _, *allocation = texts(tmp_path / budget / "caq" / "report.html")
    scope: dict[str, Any] = {}
    exec(code, scope)
    fitted(tmp_path / f"{budget}-again", scope["callback"])
    assert same(scope["callback"].plan, first.plan)

    config = tmp_path / f"{budget}.yaml"
    config.write_text(text)
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(Classifier, args=["--config", str(config), *quiet], run=False, seed_everything_default=False)
    (callback,) = [x for x in cli.trainer.callbacks if isinstance(x, CurvatureQuantizationCallback)]
    assert callback.options == scope["callback"].options
    assert len(allocation) == (budget != "max_bytes")


def test_a_configuration_for_a_fit(tmp_path):
    class Net(Classifier):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

    first = quantizer(**LESS, loss_fn=loss, objective="task", evaluate=False, save=False)
    fitted(tmp_path / "first", first)
    text, code, _, _ = texts(tmp_path / "first" / "caq" / "report.html")
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path / "again"),
    }  # fmt: skip
    (tmp_path / "caq.yaml").write_text(text)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": settings}))
    torch.manual_seed(0)
    args = ["fit", "--config", str(tmp_path / "config.yaml"), "--config", str(tmp_path / "caq.yaml")]
    cli = LightningCLI(Net, args=args, save_config_callback=None, seed_everything_default=False)
    (callback,) = [x for x in cli.trainer.callbacks if isinstance(x, CurvatureQuantizationCallback)]
    assert (callback.loss_fn, callback.evaluate, callback.saving.save) == (loss, False, False)
    assert same(callback.plan, first.plan)
    scope: dict[str, Any] = {"loss_fn": loss}
    exec(code, scope)
    assert (scope["callback"].loss_fn, scope["callback"].saving.save) == (loss, False)


@every("method", ["cet", "caq", "hawq_v2"])
def test_the_bits_are_allocated_again(tmp_path, monkeypatch, capsys, method):
    callback = quantizer(**{**LESS, "method": method, "avg_bits": 3.6, "bits": (2, 3, 4, 5, 6, 8)})
    fitted(tmp_path / method, callback)
    *_, command = texts(tmp_path / method / "caq" / "report.html")
    program, *arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path / method / "caq")
    assert program == "lightning-caq"
    capsys.readouterr()
    main(arguments)
    printed = capsys.readouterr().out
    for name, bits in callback.plan.bits.items():
        assert re.search(rf"^{re.escape(name)} +{bits} ", printed, re.MULTILINE), printed
