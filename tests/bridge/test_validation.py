"""The bridge: a validation loop that nobody else notices."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lit import (
    CLASSES,
    AtHook,
    Classifier,
    at,
    blobs,
    classifier,
    own_metrics,
    snapshot,
    train_loader,
    trainer,
    val_loader,
)
from torch.utils.data import DataLoader, Subset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_caq.bridge.validation import isolated_validation

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


@BOTH
def test_the_extra_loop_measures_and_nobody_notices(tmp_path, package):
    seen = []

    class Nosy(lightning.pytorch.Callback, pytorch_lightning.Callback):
        def on_validation_start(self, t, m):
            seen.append("validation")

        def on_fit_end(self, t, m):
            seen.append("fit_end")

        def teardown(self, t, m, stage):
            seen.append(f"teardown {stage.lower()}")

    def act(t, m):
        del seen[:]
        before = snapshot(m, t)
        validate = isolated_validation(t, m)
        found = validate(m), validate(m)
        assert snapshot(m, t) == before
        assert not seen
        with torch.no_grad():
            m.net[4].weight.zero_()  # the loop sees the network as it then is
        changed = validate(m)
        return *found, changed, own_metrics(m)

    probe, module = AtHook("on_train_end", act), classifier(package)()
    logger = package.loggers.CSVLogger(tmp_path)
    t = trainer(tmp_path, package, callbacks=[probe, Nosy()], logger=logger)
    t.fit(module, train_loader(), val_loader())
    first, again, changed, expected = probe.results[0]
    assert first == again
    assert changed == pytest.approx(expected)
    assert changed["val_loss"] != first["val_loss"]
    assert seen == ["fit_end", "teardown fit"]
    assert t.callback_metrics["val_loss"] == pytest.approx(first["val_loss"])


@BOTH
def test_the_extra_loop_inside_stand_alone_validation(tmp_path, package):
    """The live loop has its iterators already; the user's own results must not change by it."""

    def act(t, m):
        with torch.inference_mode(False):
            return isolated_validation(t, m)(m)

    module = classifier(package)()
    trainer(tmp_path, package).fit(module, train_loader(), val_loader())
    expected = trainer(tmp_path, package).validate(module, val_loader(), verbose=False)[0]
    probe = AtHook("on_validation_start", act)
    results = trainer(tmp_path, package, callbacks=[probe]).validate(module, val_loader(), verbose=False)[0]
    assert results == pytest.approx(expected)
    assert probe.results[0] == pytest.approx(expected)
    assert probe.results[0] == pytest.approx(own_metrics(module))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_extra_loop_does_not_rewind_persistent_workers(tmp_path):
    def act(t, m):
        with torch.inference_mode(False):
            return isolated_validation(t, m)(m)

    loader = val_loader(num_workers=1, persistent_workers=True)
    module, probe = Classifier(), AtHook("on_validation_start", act)
    results = trainer(tmp_path, callbacks=[probe]).validate(module, loader, verbose=False)[0]
    assert results == pytest.approx(own_metrics(module))
    assert probe.results[0] == pytest.approx(own_metrics(module))


def test_the_extra_loop_where_validation_never_ran(tmp_path):
    result = at(
        "on_train_end", lambda t, m: isolated_validation(t, m)(m), tmp_path, max_epochs=1,
        num_sanity_val_steps=0, check_val_every_n_epoch=2,
    )  # fmt: skip
    assert set(result) == {"val_acc", "val_loss"}


def test_shuffled_and_limited_validation_sees_the_same_batches_each_time(tmp_path):
    def act(t, m):
        validate = isolated_validation(t, m)
        first = validate(m)
        torch.rand(3)
        return first, validate(m)

    loaders = train_loader(), val_loader(shuffle=True)
    with pytest.warns(UserWarning, match="shuffling enabled"):
        first, again = at("on_train_end", act, tmp_path, None, loaders, limit_val_batches=1)
    assert first == again


@pytest.mark.parametrize(("loaders", "limit"), [((train_loader(), val_loader()), 0), ((train_loader(),), 1.0)])
@pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`")
def test_without_validation_data_there_is_a_warning_and_no_loop(tmp_path, loaders, limit):
    with pytest.warns(UserWarning, match="there is no validation data.*evaluate=False"):
        result = at("on_train_end", isolated_validation, tmp_path, None, loaders, limit_val_batches=limit)
    assert result is None


def test_several_loaders_and_forked_metrics_count_once(tmp_path):
    class Forked(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), on_step=True, on_epoch=True)
            self.logger.experiment.add_scalar("anything", 1.0)  # a step may draw on its logger

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    loaders = train_loader(), [val_loader(), val_loader(batch_size=8)]
    result = at("on_train_end", lambda t, m: isolated_validation(t, m)(m), tmp_path, Forked(), loaders, logger=logger)
    assert set(result) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    assert result["val_loss/dataloader_idx_0"] == pytest.approx(result["val_loss/dataloader_idx_1"])


def test_an_error_in_validation_restores_the_trainer(tmp_path):
    class Fails(Classifier):
        failing = False

        def validation_step(self, batch, batch_idx):
            if self.failing:
                raise RuntimeError("no")
            super().validation_step(batch, batch_idx)

    def act(t, m):
        before, callbacks, loop = snapshot(m, t), t.callbacks, t.fit_loop.epoch_loop.val_loop
        m.failing = True
        with pytest.raises(RuntimeError, match="no"):
            isolated_validation(t, m)(m)
        assert snapshot(m, t) == before
        return t.callbacks is callbacks and t.fit_loop.epoch_loop.val_loop is loop

    assert at("on_train_end", act, tmp_path, Fails())


def per_sample(package):
    """A module that logs metrics by ``forward``, by ``update``, of a collection that shares states, and batch means."""

    class PerSample(classifier(package)):
        def __init__(self):
            super().__init__()
            self.micro, self.wrong = (MulticlassAccuracy(CLASSES, average="micro") for _ in range(2))
            self.both = MetricCollection({"prec": MulticlassPrecision(CLASSES), "rec": MulticlassRecall(CLASSES)})

        def validation_step(self, batch, batch_idx):
            logits = 0.2 * self(batch[0]) + torch.cos(40 * batch[0][:, :CLASSES])
            self.micro(logits, batch[1])
            self.wrong.update(logits.roll(1, 0), target=batch[1])
            self.both.update(logits, batch[1])
            self.log("micro", self.micro)
            self.log("wrong", self.wrong)
            self.log_dict(dict(self.both))
            self.log("loss", F.cross_entropy(logits, batch[1]))
            self.log("correct", (logits.argmax(1) == batch[1]).float().mean())
            self.log("greatest", logits.max(), reduce_fx="max")

    return PerSample()


@BOTH
def test_metrics_come_with_standard_errors(tmp_path, package):
    generator = torch.Generator().manual_seed(3)
    shuffled = Subset(blobs(192, seed=1), torch.randperm(192, generator=generator).tolist())
    loaders = train_loader(), DataLoader(shuffled, batch_size=8)
    probe = AtHook("on_train_end", lambda t, m: isolated_validation(t, m)(m))
    trainer(tmp_path, package, callbacks=[probe]).fit(per_sample(package), *loaders)
    result = probe.results[0]
    p, q = float(result["micro"]), float(result["wrong"])
    assert 0.3 < p < 0.95
    assert result["micro"].stderr == pytest.approx((p * (1 - p) / 191) ** 0.5, rel=0.3)
    assert result["wrong"].stderr == pytest.approx((q * (1 - q) / 191) ** 0.5, rel=0.3)
    assert result["correct"].stderr == pytest.approx(result["micro"].stderr, rel=0.4)  # of 24 batches
    assert result["loss"].stderr > 0
    for name in ("prec", "rec"):
        assert result[name].stderr == pytest.approx(result["micro"].stderr, rel=0.5)
    assert {x.samples for name, x in result.items() if name != "greatest"} == {192}
    assert result["greatest"].stderr is None


def test_the_same_groups_are_left_out_of_every_network(tmp_path):
    def act(t, m):
        validate = isolated_validation(t, m)
        before = validate(m)
        with torch.no_grad():
            m.net[4].weight += 0.3
        return before, validate(m)

    loaders = train_loader(), val_loader(batch_size=4)
    before, after = at("on_train_end", act, tmp_path, per_sample(lightning.pytorch), loaders)
    for name in ("micro", "loss"):
        assert before[name].less(after[name]).stderr is not None
    # Networks that agree on most samples differ by less than each is uncertain.
    assert before["loss"].less(after["loss"]).stderr < before["loss"].stderr


def test_a_mean_of_few_batches_is_known_by_their_parts(tmp_path):
    shuffled = Subset(blobs(192, seed=1), torch.randperm(192, generator=torch.Generator().manual_seed(3)).tolist())
    loaders = train_loader(), DataLoader(shuffled, batch_size=96)
    before, result, after = at(
        "on_train_end",
        lambda t, m: (snapshot(m, t), isolated_validation(t, m)(m), snapshot(m, t)),
        tmp_path,
        per_sample(lightning.pytorch),
        loaders,
    )
    assert before == after
    p = float(result["correct"])
    assert result["correct"].samples == 192
    assert result["correct"].stderr == pytest.approx((p * (1 - p) / 191) ** 0.5, rel=0.35)
    assert result["loss"].stderr > 0
    assert result["micro"].stderr == pytest.approx(result["correct"].stderr, rel=0.4)
