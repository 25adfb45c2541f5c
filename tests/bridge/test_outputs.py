from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lit
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.bridge import outputs


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory) -> Path:
    """What a run of the callback leaves with a TensorBoardLogger."""
    folder = tmp_path_factory.mktemp("logs")
    callback = CurvatureQuantizationCallback(avg_bits=4, curvature_samples=16, guard=False, seed=11)
    t = lit.trainer(folder, logger=TensorBoardLogger(str(folder), name=""), callbacks=[callback], max_epochs=1)
    t.fit(lit.Classifier(), lit.train_loader(), lit.val_loader())
    return Path(t.logger.log_dir)


def test_options_are_hyperparameters_of_the_logger(log_dir) -> None:
    events = EventAccumulator(str(log_dir))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    options = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["caq/method"].string_value == "cet"
    assert (options["caq/avg_bits"].number_value, options["caq/seed"].number_value) == (4, 11)


def test_there_is_one_run_folder_with_one_event_file(log_dir) -> None:
    assert len(list(log_dir.parent.rglob("events.out.*"))) == 1
    assert [path.name for path in log_dir.parent.iterdir()] == [log_dir.name]


def test_text_layout_and_histograms_are_in_it(log_dir) -> None:
    events = EventAccumulator(str(log_dir))
    events.Reload()
    tags = events.Tags()
    assert {"caq/weights/net.0/before", "caq/weights/net.0/after"} <= set(tags["histograms"])
    assert {"caq/summary/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert {"caq/bits/net.0", "caq/avg_bits", "caq/quantized/val_acc"} <= set(tags["scalars"])
    assert {"caq/bits", "caq/curvature", "caq/loss_gap"} <= set(tags["images"])


def test_nothing_is_drawn_or_copied_on_other_ranks(monkeypatch, tmp_path) -> None:
    for name in ("draw_gallery", "write_outputs", "log_to_tensorboard"):
        monkeypatch.setattr(outputs, name, lambda *args, **kwargs: pytest.fail("this is for rank zero"))
    other = SimpleNamespace(is_global_zero=False, loggers=[TensorBoardLogger(str(tmp_path))])
    outputs.write(other, tmp_path, None, {})
    assert outputs.float_weights(other, lit.Classifier()) == {}
    assert list(tmp_path.iterdir()) == []
