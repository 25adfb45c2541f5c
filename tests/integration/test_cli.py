"""The callback from the command line, with the programs of ``examples/``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningCLI
from lit import classifier, train_loader, val_loader

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.plan import QuantizationPlan

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLBACK = "lightning_caq.CurvatureQuantizationCallback"
BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
pytestmark = [
    # LightningCLI's own use of jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*checkpoint callbacks directory|.*Checkpoint directory"),
]


def by_hand_loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


def program(path, arguments, monkeypatch, folder):
    """Run an example as ``python path arguments`` would, in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(path), run_name="__main__")


QUICK = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=10",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks.calibration_samples=64",
    "--trainer.callbacks.curvature_samples=16",
    "--trainer.callbacks.guard=false",
]


@pytest.mark.parametrize(
    ("config", "more", "method", "budget"),
    [
        ("cet", [], "cet", "avg_bits=2.5"),
        ("caq", [], "caq", "ratio=10"),
        ("cet", [f"--trainer.callbacks+={CALLBACK}", "--trainer.callbacks.avg_bits=3"], "cet", "avg_bits=3"),
    ],
)
@pytest.mark.filterwarnings("ignore:caq. .* does nothing, because another")
def test_the_example_program_quantizes(tmp_path, monkeypatch, config, more, method, budget):
    arguments = ["fit", "--config", str(EXAMPLES / "cli" / f"{config}.yaml"), *more, *QUICK]
    program(EXAMPLES / "cli" / "main.py", arguments, monkeypatch, tmp_path)
    plan = QuantizationPlan.load(tmp_path / "demo_logs" / f"cli_{config}" / "version_0" / "caq" / "plan.json")
    assert (plan.method, plan.budget) == (method, budget)


def test_the_configuration_is_printed_whole(tmp_path, monkeypatch, capsys):
    arguments = ["fit", "--config", str(EXAMPLES / "cli" / "cet.yaml"), "--print_config"]
    with pytest.raises(SystemExit) as end:
        program(EXAMPLES / "cli" / "main.py", arguments, monkeypatch, tmp_path)
    assert end.value.code == 0
    (callback,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callback["class_path"] == CALLBACK
    assert callback["init_args"]["avg_bits"] == 2.5
    assert callback["init_args"]["rounding"] == "error_feedback"
    CurvatureQuantizationCallback(**callback["init_args"])  # and it can be read back


def test_the_first_example_runs(tmp_path, monkeypatch, capsys):
    program(
        EXAMPLES / "01_callback.py",
        ["--network", "mlp", "--epochs", "1", "--curvature-samples", "16"],
        monkeypatch,
        tmp_path,
    )
    printed = capsys.readouterr().out
    assert "quantized (cet)" in printed
    assert "tensorboard --logdir demo_logs" in printed
    assert (tmp_path / "demo_logs" / "mlp" / "version_0" / "caq" / "plan.json").exists()


@BOTH
def test_every_argument_can_be_said_in_yaml(tmp_path, package):
    from pytorch_lightning.cli import LightningCLI as OtherCLI

    kind = LightningCLI if package is lightning.pytorch else OtherCLI
    module = classifier(package)
    module.train_dataloader = lambda self: train_loader()
    module.val_dataloader = lambda self: val_loader()
    options = {
        "method": "caq", "ratio": 2.0, "bits": [3, 4, 8], "rounding": "nearest", "batchnorm": "keep",
        "objective": "task", "calibration_samples": 48, "curvature_samples": 24, "eigenpairs": 8,
        "loss_fn": f"{__name__}.by_hand_loss", "evaluate": False, "compare": ["uniform", "cet"],
        "monitor_every_n_epochs": 1, "include": ["net.*"], "exclude": ["net.4"], "seed": 3,
    }  # fmt: skip
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
        "callbacks": [{"class_path": CALLBACK, "init_args": options}],
    }  # fmt: skip
    cli = kind(
        module,
        args=["fit", f"--trainer={yaml.safe_dump(settings, default_flow_style=True)}"],
        save_config_callback=None,
    )
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, CurvatureQuantizationCallback))
    assert callback.loss_fn is by_hand_loss
    assert callback.options.bits == (3, 4, 8)
    assert set(callback.plan.bits) == {"net.0"}


def test_a_bad_value_is_refused_with_one_sentence(tmp_path, monkeypatch, capsys):
    arguments = ["fit", "--config", str(EXAMPLES / "cli" / "cet.yaml"), "--trainer.callbacks.avg_bits=1", *QUICK]
    with pytest.raises(Exception, match="avg_bits=1 cannot be met"):
        program(EXAMPLES / "cli" / "main.py", arguments, monkeypatch, tmp_path)
