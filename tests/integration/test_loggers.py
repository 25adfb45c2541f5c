"""What each logger gets: all of them the numbers, and those that show pictures the pictures, each in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml
from lightning.pytorch.loggers import CSVLogger
from lit import classifier, train_loader, trainer, val_loader
from matplotlib.figure import Figure

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.bridge import outputs
from lightning_caq.reporting.gallery import Gallery

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


@pytest.fixture(autouse=True)
def one_small_figure(monkeypatch):
    figure = Figure(figsize=(1, 1))
    monkeypatch.setattr(outputs, "draw_gallery", lambda *_: Gallery({"bits": figure}))


def fit(folder: Path, logger: Any, package: Any = lightning.pytorch) -> Any:
    """Fit a module that has a hyperparameter of its own."""

    class Own(classifier(package)):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()

    callback = CurvatureQuantizationCallback(
        avg_bits=3, calibration_samples=24, curvature_samples=8, eigenpairs=4, guard=False, compare=[]
    )
    t = trainer(folder, package, callbacks=[callback], logger=logger, max_epochs=1)
    t.fit(Own(), train_loader(), val_loader())
    return callback, t


@BOTH
def test_tensorboard(tmp_path, package):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    logger = package.loggers.TensorBoardLogger(tmp_path)
    callback, t = fit(tmp_path, [logger, CSVLogger(tmp_path, name="csv")], package)
    assert (Path(logger.log_dir) / "caq" / "report.json").exists()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (bits,) = events.Scalars("caq/bits/net.0")
    assert (bits.value, bits.step) == (callback.plan.bits["net.0"], t.global_step)
    assert [tag for tag in events.Tags()["images"] if tag.startswith("caq/")] == ["caq/bits"]
    assert "caq/quantized/val_acc" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    for folder in (logger.log_dir, tmp_path / "csv" / "version_0"):
        hparams = yaml.safe_load((Path(folder) / "hparams.yaml").read_text())
        assert hparams == {"width": 16, "caq": callback.report.options}
    assert callback.report.options["bits"] == [2, 3, 4, 5, 6, 8]
    shown = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    assert set(shown.session_start_info.hparams) == {"width"}  # TensorBoard keeps the first of a run


@BOTH
def test_weights_and_biases(tmp_path, package, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    logger = package.loggers.WandbLogger(project="caq", save_dir=tmp_path, offline=True)
    callback, t = fit(tmp_path, logger, package)
    shown = dict(logger.experiment.summary)
    assert shown["caq/bits/net.0"] == callback.plan.bits["net.0"]
    assert shown["caq/quantized/val_loss"] == pytest.approx(callback.report.metrics["quantized/val_loss"])
    assert shown["caq/bits"]["count"] == 1
    pictures = list(tmp_path.rglob("files/media/images/caq/*.png"))
    assert len(pictures) == 1
    assert pictures[0].read_bytes() == (Path(t.log_dir or tmp_path) / "caq" / "bits.png").read_bytes()
    assert logger.experiment.config["caq"] == callback.report.options
    assert logger.experiment.config["width"] == 16
    wandb.finish()


@BOTH
def test_mlflow(tmp_path, package, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = package.loggers.MLFlowLogger("caq", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    callback, _ = fit(tmp_path, logger, package)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["caq/bits/net.0"] == callback.plan.bits["net.0"]
    options = {f"caq/{k}": str(x) for k, x in callback.report.options.items() if x != []}  # MLflow has no empty lists
    assert run.data.params == {"width": "16", **options}
    (artifact,) = logger.experiment.list_artifacts(logger.run_id, "caq")
    assert artifact.path == "caq/bits.png"
    assert artifact.file_size == next(tmp_path.rglob("bits.png")).stat().st_size > 0


class Experiment:
    """The part of a Comet experiment that is used."""

    def __init__(self) -> None:
        self.images: list[Any] = []

    def log_image(self, image_data: Any, name: str | None = None, step: int | None = None) -> None:
        assert Path(image_data).exists()
        self.images.append((Path(image_data).name, name, step))


class CometLike(CSVLogger):
    @property
    def experiment(self) -> Any:
        self.sent = getattr(self, "sent", None) or Experiment()
        return self.sent

    def log_metrics(self, metrics, step=None):
        self.logged = {**getattr(self, "logged", {}), **metrics}

    def log_hyperparams(self, params=None):
        self.options = [*getattr(self, "options", []), params]

    def save(self):
        pass


def test_comet_by_its_interface(tmp_path):
    logger = CometLike(tmp_path)
    callback, t = fit(tmp_path, logger)
    assert logger.sent.images == [("bits.png", "caq/bits", t.global_step)]
    assert logger.logged["caq/bits/net.4"] == callback.plan.bits["net.4"]
    assert logger.options == [{"width": 16}, {"caq": callback.report.options}]  # each once


def test_every_logger_in_a_list_gets_the_numbers_and_the_files_are_always_written(tmp_path):
    first, second = CSVLogger(tmp_path, name="first"), CSVLogger(tmp_path, name="second")
    fit(tmp_path, [first, second])
    for logger in (first, second):
        assert "caq/quantized/val_acc" in (Path(logger.log_dir) / "metrics.csv").read_text()
    files = {path.name for path in (Path(first.log_dir) / "caq").iterdir()}
    assert files >= {"bits.png", "plan.json", "report.json", "profile.json", "layers.csv", "report.html"}
