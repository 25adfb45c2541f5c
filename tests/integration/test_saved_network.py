"""A fit by a LightningCLI, and what its console says to do next, run in a new process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import lit
from lightning.pytorch.cli import LightningCLI

class Net(lit.Classifier):
    """Its test is its validation."""

    def train_dataloader(self):
        return lit.train_loader()

    def val_dataloader(self):
        return lit.val_loader()

    test_dataloader = val_dataloader

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

if __name__ == "__main__":
    LightningCLI(Net)
'''
CALLBACK = {
    "class_path": "lightning_caq.CurvatureQuantizationCallback",
    "init_args": {"avg_bits": 2, "calibration_samples": 48, "curvature_samples": 24},
}


def run(folder: Path, *arguments: str) -> str:
    """What a program prints, in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the console of a fit."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "main.py").write_text(PROGRAM)
    trainer = {"max_epochs": 2, "accelerator": "cpu", "callbacks": [CALLBACK], "enable_progress_bar": False}
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    return folder, run(folder, "main.py", "fit", "--config", "config.yaml")


def report_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "lightning_logs" / "version_0" / "caq" / "report.json").read_text())["metrics"]


def test_the_command_that_a_fit_prints_gives_the_metrics_that_the_report_gave(fitted) -> None:
    folder, console = fitted
    command = re.search(r"or: +python (main\.py test .*--ckpt_path .*quantized\.ckpt)$", console, re.MULTILINE)[1]
    printed, metrics = run(folder, *command.split()), report_of(folder)
    assert metrics["float/val_loss"] != pytest.approx(metrics["quantized/val_loss"], rel=1e-3)
    for name in ("val_acc", "val_loss"):
        assert float(re.search(rf"{name}\D+([\d.]+)", printed)[1]) == pytest.approx(
            metrics[f"quantized/{name}"], rel=1e-5
        )
    assert "float network" not in printed


def test_a_fit_from_the_quantized_checkpoint_goes_on_quantized(fitted) -> None:
    folder, _ = fitted
    checkpoint = "lightning_logs/version_0/checkpoints/quantized.ckpt"
    arguments = ["--config", "config.yaml", "--ckpt_path", checkpoint, "--trainer.max_epochs=3"]
    assert "The quantized network was trained on" in run(folder, "main.py", "fit", *arguments)


def test_a_test_of_the_float_checkpoint_says_so(fitted) -> None:
    folder, _ = fitted
    (float_checkpoint,) = (folder / "lightning_logs" / "version_0" / "checkpoints").glob("epoch*.ckpt")
    arguments = ["main.py", "test", "--config", "config.yaml", "--ckpt_path", str(float_checkpoint)]
    script = f"import sys, warnings, runpy; sys.argv = {arguments!r}; warnings.simplefilter('default'); "
    printed = run(folder, "-c", script + "runpy.run_path('main.py', run_name='__main__')")
    assert "test runs the float network" in printed
    assert "lies in lightning_logs/version_0/checkpoints/quantized.ckpt" in printed
    loss = report_of(folder)["float/val_loss"]
    assert float(re.search(r"val_loss\D+([\d.]+)", printed)[1]) == pytest.approx(loss, rel=1e-5)
