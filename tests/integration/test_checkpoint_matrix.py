"""Every checkpoint that a run leaves, used in every way, with the callback and without, for several networks.

A float checkpoint stays float. A quantized one comes back bit-identical with the callback, and as plain layers that
hold the quantized values, with Lightning's warning, without it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from every import every
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lit import CLASSES, FEATURES, blobs, trainer, without_figures
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

EPOCHS = 2
FLOAT, QUANTIZED, VALUES = "float", "quantized", "values"  # VALUES: the quantized weights, and no plan with them


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def _cnn() -> nn.Module:
    image = nn.Unflatten(1, (1, FEATURES))
    features = [nn.Conv1d(1, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(image, *features, nn.Linear(4 * FEATURES, CLASSES))


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Tanh())
    net[2].weight = net[0].weight
    return net.append(nn.Linear(FEATURES, CLASSES))


NETWORKS = {"mlp": _mlp, "cnn": _cnn, "tied": _tied, "configure_model": _mlp}


class Net(lightning.pytorch.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = None if kind == "configure_model" else NETWORKS[kind]()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = NETWORKS[self.hparams.kind]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(blobs(), batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(blobs(48, seed=1), batch_size=48)

    test_dataloader = predict_dataloader = val_dataloader


def built(kind: str) -> Net:
    net = Net(kind)
    net.configure_model()
    return net


def quantizer() -> CurvatureQuantizationCallback:
    return CurvatureQuantizationCallback(
        avg_bits=2.5, bits=[2, 3], calibration_samples=32, curvature_samples=8, eigenpairs=4,
        compare=[], guard=False,
    )  # fmt: skip


def outputs(net: Net) -> Tensor:
    training = net.training
    net.eval()
    with torch.no_grad():
        found = net(blobs(48, seed=1).tensors[0])
    net.train(training)
    return found


@dataclass(frozen=True)
class Saved:
    """A checkpoint, what it holds, and what that computes."""

    path: Path
    holds: str
    outputs: Tensor
    plan: QuantizationPlan | None = None


def float_outputs(kind: str, path: Path) -> Tensor:
    """By torch alone."""
    net = built(kind)
    net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return outputs(net)


class Run:
    """A fit with the callback."""

    def __init__(self, folder: Path, kind: str, *callbacks: Callback) -> None:
        self.callback, self.net = quantizer(), Net(kind)
        self.trainer = trainer(
            folder, callbacks=[*callbacks, self.callback], enable_checkpointing=True, max_epochs=EPOCHS
        )
        self.trainer.fit(self.net)
        self.outputs = outputs(self.net)

    def saved(self, path: Path, holds: str = QUANTIZED) -> Saved:
        return Saved(path, holds, self.outputs, self.callback.plan)


def checkpoints(folder: Path, kind: str) -> dict[str, Saved]:
    """Every kind of checkpoint there is, from three fits."""
    keep = ModelCheckpoint(folder, "best", monitor="val_loss", save_last=True)
    plain = Run(folder, kind, keep)
    found = {name: folder / f"{name}.ckpt" for name in ("best", "last", "finished", "weights_only", "save_last", "ema")}
    saved = {name: Saved(found[name], FLOAT, float_outputs(kind, found[name])) for name in ("best", "last")}
    plain.trainer.save_checkpoint(found["finished"])
    plain.trainer.save_checkpoint(found["weights_only"], weights_only=True)
    saved["finished"] = plain.saved(found["finished"])
    saved["weights_only"] = plain.saved(found["weights_only"], VALUES)

    # ModelCheckpoint runs after every other callback; with nothing saved before, it writes what is there at the end.
    # Before 2.5.6 it did not: the last checkpoint was written as training went.
    late = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_epochs=99, save_on_train_epoch_end=False)
    late.CHECKPOINT_NAME_LAST = "save_last"
    last = Run(folder, kind, late)
    at_the_end = "on_train_end" in vars(ModelCheckpoint)
    written = found["save_last"]
    saved["save_last"] = last.saved(written) if at_the_end else Saved(written, FLOAT, float_outputs(kind, written))

    if averaging := ema():
        keep = ModelCheckpoint(folder, "ema_best", monitor="val_loss")
        average = Run(folder, kind, averaging, keep)
        validated = float(average.trainer.validate(average.net, verbose=False)[0]["val_loss"])
        assert validated == pytest.approx(average.callback.report.metrics["quantized/val_loss"])  # not the average's
        average.trainer.save_checkpoint(found["ema"])
        saved["ema"] = average.saved(found["ema"])
        path = folder / "ema_best.ckpt"
        saved["ema_best"] = Saved(path, FLOAT, float_outputs(kind, path))
    return saved


def ema() -> Any:
    """Lightning's averaging callback, or ``None`` in the versions before it."""
    averaging = getattr(lightning.pytorch.callbacks, "EMAWeightAveraging", None)
    return averaging and averaging(decay=0.8)


NAMES = ("best", "last", "save_last", "finished", "weights_only", *(("ema", "ema_best") if ema() else ()))
RESUMABLE = tuple(name for name in NAMES if name != "weights_only")


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, tmp_path_factory):
    """The kind of network and its checkpoints."""
    torch.manual_seed(0)
    with without_figures():
        return request.param, checkpoints(tmp_path_factory.mktemp(request.param), request.param)


attached_or_not = every("attached", [True, False])
pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    # Lightning's, for callbacks of the first run; it is asserted where it is ours that is missing
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*checkpoint directory contents|.*Checkpoint directory"),
]


def missing(saved: Saved, attached: bool) -> Any:
    """The warning with which Lightning says that a callback is missing that has left something in a checkpoint."""
    ours = saved.holds == QUANTIZED and not attached
    return pytest.warns(UserWarning, match="Be aware.*CurvatureQuantizationCallback") if ours else nullcontext()


def check(net: Net, saved: Saved, callback: CurvatureQuantizationCallback | None) -> None:
    """The network computes what the checkpoint holds, and is swapped if and only if that is quantized."""
    if saved.holds == QUANTIZED and callback is not None:
        assert set(quantized_modules(net)) == {name for x in saved.plan.layers for name in x.modules}
        assert all(rounding_state(module).quantizing for module in quantized_modules(net).values())
        assert callback.plan.bits == saved.plan.bits
        assert torch.equal(outputs(net), saved.outputs)
        return
    assert not quantized_modules(net)
    assert callback is None or callback.plan is None
    if saved.holds == FLOAT:
        assert torch.equal(outputs(net), saved.outputs)
    else:
        assert torch.allclose(outputs(net), saved.outputs, atol=1e-6)


def is_quantized(net: Net, plan: QuantizationPlan) -> bool:
    """Judged by the numbers alone."""
    rows = [(row, x.grid.bits) for x in plan.layers for row in net.get_submodule(x.name).weight.detach().flatten(1)]
    return bool(quantized_modules(net)) and all(len(row.unique()) <= 2**bits for row, bits in rows)


@attached_or_not
@every("use", ["validate", "test", "predict"])
@every("by_path", [True, False])
@every("name", NAMES)
def test_a_stand_alone_run(tmp_path, network, name, use, by_path, attached):
    kind, checkpoint = network[0], network[1][name]
    callback, net = (quantizer() if attached else None), Net(kind)
    run = getattr(trainer(tmp_path, callbacks=[callback] if attached else []), use)
    quiet = {} if use == "predict" else {"verbose": False}
    as_float = attached and use != "validate" and not (by_path and checkpoint.holds == QUANTIZED)
    told = pytest.warns(UserWarning, match=f"{use} runs the float network") if as_float else nullcontext()
    if by_path:
        with missing(checkpoint, attached), told:
            run(net, ckpt_path=checkpoint.path, **quiet)
    else:
        net.configure_model()
        net.load_state_dict(torch.load(checkpoint.path, weights_only=True)["state_dict"])
        with told:
            run(net, **quiet)
    if use == "validate" and attached and not (by_path and checkpoint.holds == QUANTIZED):
        assert is_quantized(net, callback.plan)  # a network without a plan is quantized ahead of validation
    else:
        check(net, checkpoint, callback if by_path else None)


@attached_or_not
@every("name", NAMES)
def test_load_from_checkpoint_and_no_trainer(network, name, attached):
    kind, checkpoint = network[0], network[1][name]
    loaded = Net.load_from_checkpoint(checkpoint.path)
    check(loaded, checkpoint, None)
    net = built(kind)
    net.load_state_dict(torch.load(checkpoint.path, weights_only=True)["state_dict"])
    if attached and checkpoint.holds == QUANTIZED:  # what the callback left in the checkpoint, read by hand
        states = torch.load(checkpoint.path, weights_only=True)["callbacks"]
        (state,) = [x for key, x in states.items() if key.startswith("CurvatureQuantizationCallback")]
        assert QuantizationPlan.from_state_dict(state["plan"]).attach(net)
        assert torch.equal(outputs(net), checkpoint.outputs)
    else:
        check(net, checkpoint, None)


@attached_or_not
@every("name", NAMES)
def test_a_resumed_fit(tmp_path, network, name, attached):
    kind, checkpoint = network[0], network[1][name]
    callback, net = (quantizer() if attached else None), Net(kind)
    t = trainer(tmp_path, callbacks=[callback] if attached else [], max_epochs=EPOCHS + 1)
    if checkpoint.holds == VALUES:
        with pytest.raises(KeyError, match="contains only the model"):  # Lightning's: there is no optimizer in it
            t.fit(net, ckpt_path=checkpoint.path)
        check(net, checkpoint, callback)
        return
    with missing(checkpoint, attached):
        t.fit(net, ckpt_path=checkpoint.path)
    assert t.current_epoch == EPOCHS + 1
    if not attached:
        assert not quantized_modules(net)
        assert not torch.allclose(outputs(net), checkpoint.outputs, atol=1e-6)
        return
    assert is_quantized(net, callback.plan)
    check_settled(callback, checkpoint)


@pytest.mark.skipif(ema() is None, reason="no EMAWeightAveraging in this version of Lightning")
@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
@every("name", RESUMABLE)
def test_a_resumed_fit_that_averages(tmp_path, network, name):
    """Whether the checkpoint was written by an averaging fit or not; ``test_averaging`` looks at the numbers."""
    kind, checkpoint = network[0], network[1][name]
    callback, averaging, net = quantizer(), ema(), Net(kind)
    t = trainer(tmp_path, callbacks=[averaging, callback], max_epochs=EPOCHS + 1)
    t.fit(net, ckpt_path=checkpoint.path)
    assert t.current_epoch == EPOCHS + 1
    assert is_quantized(net, callback.plan)
    check_settled(callback, checkpoint)


def check_settled(callback: CurvatureQuantizationCallback, saved: Saved) -> None:
    """What was quantized before has been trained on, on the same grids."""
    if saved.holds == QUANTIZED:
        pairs = zip(callback.plan.layers, saved.plan.layers, strict=True)
        assert all(torch.equal(a.grid.scale, b.grid.scale) for a, b in pairs)
        assert any("trained on" in note for note in callback.report.notes)


@attached_or_not
@every("name", RESUMABLE)
def test_a_finished_fit(tmp_path, network, name, attached):
    """There is nothing left to train, so Lightning calls no ``on_train_end`` and nothing is quantized."""
    kind, checkpoint = network[0], network[1][name]
    progress = torch.load(checkpoint.path, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]
    epochs = progress["current"]["processed"]
    callback, net = (quantizer() if attached else None), Net(kind)
    t = trainer(tmp_path, callbacks=[callback] if attached else [], max_epochs=epochs)
    with missing(checkpoint, attached):
        t.fit(net, ckpt_path=checkpoint.path)
    check(net, checkpoint, callback)
