"""Whatever goes wrong, the float network and its checkpoints stay whole, and one sentence says what happened."""

from __future__ import annotations

import errno
import inspect
import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import Classifier, same, train_loader, trainer, val_loader, weights

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.errors import CAQError, OptionError
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:Detected KeyboardInterrupt"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    defaults = {"avg_bits": 3, "calibration_samples": 24, "curvature_samples": 8, "eigenpairs": 4, "compare": []}
    return CurvatureQuantizationCallback(**{**defaults, "guard": False, **options})


def raises(error: BaseException) -> Any:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    return broken


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
PLACES = {  # what breaks, and how
    "reading data": ("lightning_caq.callback.training_batches", RuntimeError("a worker died")),
    "allocating": ("lightning_caq.pipeline.rounded_loss", RuntimeError("out of memory")),
    "rounding": ("lightning_caq.selection.candidate.round_layer", RuntimeError("no")),
    "swapping": ("lightning_caq.plan.swap", RuntimeError("no")),
    "a full disk": ("lightning_caq.reporting.files.os.replace", FULL),
    "Ctrl-C while allocating": ("lightning_caq.pipeline.rounded_loss", KeyboardInterrupt()),
    "Ctrl-C while rounding": ("lightning_caq.selection.candidate.round_layer", KeyboardInterrupt()),
    "Ctrl-C while writing": ("lightning_caq.bridge.outputs.write_outputs", KeyboardInterrupt()),
}


def fit(folder: Path, callback: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A fit in which the callback fails; the network, how it ended, and the network ahead of the failure."""
    before: dict[str, Any] = {}

    class Look(lightning.pytorch.Callback):
        def on_train_end(self, t: Any, m: Any) -> None:
            before.update({name: x.clone() for name, x in m.state_dict().items()})

    module, end = Classifier(), None
    keep = ModelCheckpoint(folder / "kept", save_last=True)
    t = trainer(folder, callbacks=[Look(), callback, keep], enable_checkpointing=True, max_epochs=1)
    try:
        t.fit(module, train_loader(), val_loader())
    except BaseException as error:
        end = error
    return module, end, before


def assert_whole(folder: Path, module: Any, before: dict[str, Any]) -> None:
    """The network and every checkpoint hold what training ended with, to the last bit, in plain layers."""
    assert before
    assert not quantized_modules(module)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (folder / "kept").glob("*.ckpt")]
    assert len(states) == 2
    for state in (module.state_dict(), *states):
        assert state.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_leaves_everything_whole_and_is_told_in_one_sentence(tmp_path, monkeypatch, caplog, place):
    where, error = PLACES[place]
    monkeypatch.setattr(where, raises(error))
    callback = quantizer()
    with caplog.at_level(logging.INFO):
        module, end, before = fit(tmp_path, callback)
    assert type(end) in (type(error), SystemExit)  # Lightning turns Ctrl-C into an exit
    assert_whole(tmp_path, module, before)
    assert callback.plan is None
    told = [record.message for record in caplog.records if "quantization failed" in record.message]
    assert told == ["caq: quantization failed; the network and its checkpoints are as training left them."]
    assert not list((tmp_path / "caq").glob("*.json"))  # nothing half written either
    assert not list((tmp_path / "caq").glob(".writing*"))


@pytest.mark.parametrize("place", [place for place in PLACES if "Ctrl" not in place])
def test_the_run_goes_on_if_failures_are_to_be_warnings(tmp_path, monkeypatch, place):
    where, error = PLACES[place]
    monkeypatch.setattr(where, raises(error))
    with pytest.warns(UserWarning, match=f"caq: quantization failed .{type(error).__name__}: .*; training goes on"):
        module, end, before = fit(tmp_path, quantizer(on_error="warn"))
    assert end is None
    assert_whole(tmp_path, module, before)


def test_a_folder_that_cannot_be_made(tmp_path):
    """For real: a file lies where the folder should be."""
    (tmp_path / "caq").write_text("in the way")
    module, end, before = fit(tmp_path, quantizer())
    assert isinstance(end, OSError)
    assert_whole(tmp_path, module, before)
    assert (tmp_path / "caq").read_text() == "in the way"


def test_a_checkpoint_of_the_failure_holds_the_float_network(tmp_path, monkeypatch):
    """``save_on_exception`` writes what is in the network when our error reaches Lightning."""
    if "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters:
        pytest.skip("this version of Lightning has no save_on_exception")
    monkeypatch.setattr("lightning_caq.bridge.outputs.write_outputs", raises(FULL))  # the network is swapped by then
    weights: dict[str, Any] = {}

    class Look(lightning.pytorch.Callback):
        def on_train_end(self, t: Any, m: Any) -> None:
            weights.update({name: x.clone() for name, x in m.state_dict().items()})

    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_epochs=99, save_on_exception=True)
    t = trainer(tmp_path, callbacks=[Look(), quantizer(), keep], enable_checkpointing=True, max_epochs=1)
    with pytest.raises(OSError, match="No space"):
        t.fit(Classifier(), train_loader(), val_loader())
    (path,) = (tmp_path / "kept").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(x, saved["state_dict"][name]) for name, x in weights.items())
    assert not [key for key in saved["callbacks"] if "Quantization" in key]


def test_a_second_try_succeeds_after_the_cause_is_gone(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("lightning_caq.selection.candidate.round_layer", raises(RuntimeError("no")))
        callback = quantizer(on_error="warn")
        with pytest.warns(UserWarning, match="quantization failed"):
            module, _, _ = fit(tmp_path, callback)
    module.train_dataloader = train_loader
    trainer(tmp_path, callbacks=[callback]).validate(module, val_loader(), verbose=False)
    assert set(quantized_modules(module)) == {"net.0", "net.4"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("nan")], ids=["Ctrl-C", "exception"])
def test_training_that_is_cut_short_is_not_quantized(tmp_path, error):
    class Stops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return raises(error)() if batch_idx == 3 else super().training_step(batch, batch_idx)

    module, callback = Stops(), quantizer()
    with pytest.raises((KeyboardInterrupt, SystemExit, RuntimeError)):
        trainer(tmp_path, callbacks=[callback]).fit(module, train_loader(), val_loader())
    assert callback.plan is None
    assert not quantized_modules(module)
    assert not (tmp_path / "caq").exists()


# ------------------------------------------------------------------------------------------------ sharded strategies


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_strategies_that_shard_weights_are_refused_with_the_remedy(tmp_path, package, name, stage):
    """By their classes: none of them starts on one CPU."""
    t = trainer(tmp_path, package)
    t._accelerator_connector.strategy = object.__new__(getattr(package.strategies, name))
    with pytest.raises(OptionError, match=rf"{name} shards the weights.*one device.*trainer\.validate"):
        quantizer().setup(t, Classifier(), stage)


@pytest.mark.parametrize(
    ("options", "manual", "match"),
    [
        ({"include": ["enc.*"]}, False, r"include pattern 'enc\.\*' matches no layer"),
        ({"exclude": ["*"]}, False, "leave no layer to quantize"),
        ({"objective": "task"}, True, "optimises by hand"),
    ],
)
def test_what_is_certain_to_fail_is_refused_before_training(tmp_path, options, manual, match):
    module = Classifier()
    module.automatic_optimization = not manual
    before = weights(module)
    with pytest.raises(CAQError, match=match):
        trainer(tmp_path, callbacks=[quantizer(**options)]).fit(module, train_loader(), val_loader())
    assert same(weights(module), before)
