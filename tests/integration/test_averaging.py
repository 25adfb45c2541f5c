"""Fits under ``EMAWeightAveraging``: what is quantized is the average, and resuming changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lit import Classifier, train_loader, trainer, val_loader

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

DECAY = 0.8
averaging = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
pytestmark = [
    pytest.mark.skipif(averaging is None, reason="this version of Lightning has no EMAWeightAveraging"),
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Still(Classifier):
    """No dropout, so that training can be repeated; batch-norm gives it buffers that are averaged too."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    defaults = {"avg_bits": 2.5, "bits": [2, 3, 4], "calibration_samples": 32, "curvature_samples": 8, "eigenpairs": 4}
    return CurvatureQuantizationCallback(**{**defaults, "compare": [], "guard": False, **options})


def fit(folder: Path, epochs: int, *more: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    """Fit on data in a fixed order; the network, our callback and the trainer."""
    torch.manual_seed(0)
    module, callback = Still(), quantizer(**options)
    settings = {"max_epochs": epochs, "enable_checkpointing": any(isinstance(x, ModelCheckpoint) for x in more)}
    t = trainer(folder, callbacks=[averaging(decay=DECAY), callback, *more], **settings)
    t.fit(module, train_loader(shuffle=False), val_loader(), ckpt_path=ckpt_path)
    return module, callback, t


def saver(folder: Path, name: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "kept", name, save_on_train_epoch_end=True)


def assert_same(ours: QuantizationPlan, theirs: QuantizationPlan) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert [layer["bits"] for layer in ours["layers"]] == [layer["bits"] for layer in theirs["layers"]]
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    assert [k for k, x in ours["tensors"].items() if not torch.equal(x, theirs["tensors"][k])] == []


@pytest.mark.parametrize("granularity", ["layer", "channel_group"])
def test_a_resumed_fit_ends_as_the_one_that_was_not_interrupted(tmp_path, granularity):
    """Both before the network is quantized and while it trains on, when its parameters lie between the grid points."""
    options = {"granularity": granularity}
    whole, callback, t = fit(tmp_path, 2, **options)
    fit(tmp_path, 1, saver(tmp_path, "half"), **options)
    again, resumed, _ = fit(tmp_path, 2, ckpt_path=tmp_path / "kept" / "half.ckpt", **options)
    assert_same(resumed.plan, callback.plan)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())

    t.save_checkpoint(tmp_path / "quantized.ckpt")
    start = tmp_path / "quantized.ckpt"
    whole, callback, _ = fit(tmp_path, 4, ckpt_path=start, **options)
    fit(tmp_path, 3, saver(tmp_path, "third"), ckpt_path=start, **options)
    again, resumed, _ = fit(tmp_path, 4, ckpt_path=tmp_path / "kept" / "third.ckpt", **options)
    assert any("trained on" in note for note in resumed.report.notes)
    assert_same(resumed.plan, callback.plan)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize("granularity", ["layer", "channel_group"])
def test_a_network_that_trains_on_is_the_average_on_the_grids_of_the_plan(tmp_path, granularity):
    """The average by hand; the averaging callback also takes in the numbers of the grids, and cuts whole ones."""
    _, first, t = fit(tmp_path, 1, granularity=granularity)
    t.save_checkpoint(tmp_path / "quantized.ckpt")
    weights: list[torch.Tensor] = []

    class Steps(Callback):
        def on_train_batch_end(self, t: Any, m: Any, *args: Any) -> None:
            weights.append(m.net[0].weight.detach().double())

    start = tmp_path / "quantized.ckpt"
    module, callback, _ = fit(tmp_path, 3, Steps(), ckpt_path=start, granularity=granularity)
    assert len(weights) == 12
    average = weights[0]
    for weight in weights[1:]:
        average = DECAY * average + (1 - DECAY) * weight
    assert callback.plan.bits == first.plan.bits
    before, after = (x.plan.layers[0].grid for x in (first, callback))
    assert (after.width, after.scale.tolist()) == (before.width, before.scale.tolist())
    assert torch.allclose(module.net[0].weight, before.nearest(average.float()), atol=1e-6)


def test_validation_while_training_on_sees_the_grids_of_the_plan(tmp_path):
    """The average takes its place in the network for validation, grids included."""
    seen: list[Any] = []

    class Look(Callback):
        def on_validation_batch_start(self, t: Any, m: Any, *args: Any) -> None:
            seen.append({name: rounding_state(x).grid for name, x in quantized_modules(m).items()})

    _, first, t = fit(tmp_path, 1, granularity="channel_group")
    t.save_checkpoint(tmp_path / "quantized.ckpt")
    fit(tmp_path, 3, Look(), ckpt_path=tmp_path / "quantized.ckpt", granularity="channel_group")
    assert len(seen) >= 6
    for found, layer in ((grids[x.name], x) for grids in seen for x in first.plan.layers):
        assert (found.width, found.scale.tolist()) == (layer.grid.width, layer.grid.scale.tolist())


@pytest.mark.filterwarnings("ignore:caq. .*WeightAveraging comes after")
def test_an_average_that_comes_too_late_does_no_harm(tmp_path):
    """It pairs buffers by their order, and a swapped network has more of them."""
    module, callback = Still(), quantizer()
    t = trainer(tmp_path, callbacks=[callback, averaging(decay=DECAY)], max_epochs=1)
    t.fit(module, train_loader(), val_loader())
    weights = {layer.name: module.get_submodule(layer.name).weight for layer in callback.plan.layers}
    assert all(torch.equal(weights[layer.name], layer.values) for layer in callback.plan.layers)
    found = t.validate(module, val_loader(), verbose=False)[0]
    assert found["val_loss"] == pytest.approx(callback.report.metrics["quantized/val_loss"], abs=1e-6)
