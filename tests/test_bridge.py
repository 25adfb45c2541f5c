"""The bridge, against the facts of Lightning that it relies on."""

from __future__ import annotations

import random

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from lit import AtHook, Classifier, blobs, classifier, train_loader, trainer, val_loader
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
from torchmetrics import CatMetric, MeanMetric

from lightning_caq import bridge, trainers
from lightning_caq.contexts import curvature_safe
from lightning_caq.errors import CalibrationError, OptionError

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


def at(hook, act, folder, module=None, loaders=None, **kwargs):
    """Fit a module, run ``act(trainer, module)`` in a hook, and return what it returned the last time."""
    probe, module = AtHook(hook, act), module or Classifier()
    trainer(folder, callbacks=[probe, *kwargs.pop("callbacks", [])], **kwargs).fit(
        module, *(loaders or (train_loader(), val_loader()))
    )
    return probe.results[-1]


def random_state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def snapshot(module, pl_trainer):
    """Everything that a visitor must leave as it was."""
    return {
        "weights": {k: v.tolist() for k, v in module.state_dict().items()},
        "flags": [m.training for m in module.modules()],
        "grads": [p.grad is None for p in module.parameters()],
        "metrics": [(m.tp.tolist(), m._update_count) for m in (module.train_acc, module.val_acc)],
        "callback_metrics": {k: float(v) for k, v in pl_trainer.callback_metrics.items()},
        "logged_metrics": {k: float(v) for k, v in pl_trainer.logged_metrics.items()},
        "progress": str(pl_trainer.fit_loop.epoch_loop.val_loop.batch_progress),
        "state": (str(pl_trainer.state.fn), str(pl_trainer.state.stage)),
        "random": random_state(),
        "log": "log" in vars(module),
    }


def inputs(batches):
    return torch.cat([batch[0] for batch in batches])


# ---------------------------------------------------------------------------------------------- calibration batches


def test_batches_are_a_random_draw_without_repeats(tmp_path):
    batches = at("on_train_end", lambda t, m: bridge.training_batches(t, m, 40, seed=0), tmp_path)
    x, y = inputs(batches), torch.cat([b[1] for b in batches])
    assert len(x) == 40
    assert len(torch.unique(x, dim=0)) == 40
    assert set(y.tolist()) == {0, 1, 2}  # the data are sorted by class
    rows = {tuple(row.tolist()) for row in blobs().tensors[0]}
    assert all(tuple(row.tolist()) in rows for row in x)


def test_batches_depend_on_the_seed_alone(tmp_path):
    def twice(t, m):
        first = inputs(bridge.training_batches(t, m, 40, seed=0))
        torch.rand(7)
        return (
            first,
            inputs(bridge.training_batches(t, m, 40, seed=0)),
            inputs(bridge.training_batches(t, m, 40, seed=1)),
        )

    first, again, other = at("on_train_end", twice, tmp_path)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_leave_the_random_state_and_the_live_epoch_alone(tmp_path):
    """With a visit in the middle of each epoch, training sees the very batches that it sees without."""

    class Recorder(Classifier):
        def on_train_start(self):
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    def run(act, **loader):
        torch.manual_seed(0)
        module = Recorder()
        at("on_validation_start", act, tmp_path, module, (train_loader(**loader), val_loader()), val_check_interval=0.5)
        return module.seen

    def visit(t, m):
        before = random_state()
        bridge.training_batches(t, m, 32, seed=0)
        assert random_state() == before

    assert run(visit) == run(lambda t, m: None)
    sampler = SubsetRandomSampler(range(0, 96, 2))  # not a loader that can be drawn from: it is iterated
    assert run(visit, sampler=sampler, shuffle=False) == run(lambda t, m: None, sampler=sampler, shuffle=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_persistent_workers_of_the_live_loader_are_not_rewound(tmp_path):
    sampler = SubsetRandomSampler(range(96))
    loader = train_loader(sampler=sampler, shuffle=False, num_workers=1, persistent_workers=True)
    counts = []

    class Counter(Classifier):
        def training_step(self, batch, batch_idx):
            counts.append(batch_idx)
            return super().training_step(batch, batch_idx)

    at(
        "on_validation_start", lambda t, m: bridge.training_batches(t, m, 32, seed=0), tmp_path, Counter(),
        (loader, val_loader()), max_epochs=1, val_check_interval=0.5, num_sanity_val_steps=0,
    )  # fmt: skip
    assert counts == list(range(6))


def test_a_custom_sampler_keeps_its_choice_of_data(tmp_path):
    chosen = list(range(10, 30))
    loaders = train_loader(sampler=SubsetRandomSampler(chosen), shuffle=False), val_loader()
    x = inputs(at("on_train_end", lambda t, m: bridge.training_batches(t, m, 500, seed=0), tmp_path, None, loaders))
    allowed = {tuple(row.tolist()) for row in blobs().tensors[0][chosen]}
    assert {tuple(row.tolist()) for row in x} == allowed


def test_an_iterable_dataset_is_iterated(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(blobs())

    loaders = DataLoader(Stream(), batch_size=16), val_loader()
    x = inputs(at("on_train_end", lambda t, m: bridge.training_batches(t, m, 40, seed=0), tmp_path, None, loaders))
    assert torch.equal(x, blobs().tensors[0][:48])  # whole batches, as many as hold 40 samples


@pytest.mark.parametrize("kind", ["dict", "list", "combined"])
def test_collections_of_loaders_are_combined_as_in_training(tmp_path, kind):
    class Joint(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch[0], batch_idx)

    a, b = train_loader(), train_loader(batch_size=8)
    loader = {"dict": {"a": a, "b": b}, "list": [a, b], "combined": CombinedLoader({"a": a, "b": b}, "min_size")}[kind]
    batches = at(
        "on_train_end",
        lambda t, m: bridge.training_batches(t, m, 32, seed=0),
        tmp_path,
        Joint(),
        (loader, val_loader()),
    )
    first, second = batches[0].values() if kind != "list" else batches[0]
    assert len(batches) == 2
    assert (len(first[0]), len(second[0])) == (16, 8)


def test_transfer_hooks_and_precision_apply(tmp_path):
    class Shifted(Classifier):
        calls = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("before",)
            return batch

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls += ("after",)
            return batch

    def act(t, m):
        m.calls = ()
        return bridge.training_batches(t, m, 16, seed=0), m.calls

    batches, calls = at("on_train_end", act, tmp_path, Shifted(), precision="64-true")
    assert calls == ("before", "after")
    assert batches[0][0].dtype == torch.float64


def test_stand_alone_validation_finds_the_training_data_of_the_module(tmp_path):
    class WithData(Classifier):
        def train_dataloader(self):
            return train_loader()

    probe = AtHook("on_validation_start", lambda t, m: bridge.training_batches(t, m, 96, seed=0))
    trainer(tmp_path, callbacks=[probe]).validate(WithData(), val_loader(), verbose=False)
    rows = {tuple(row.tolist()) for row in blobs().tensors[0]}
    assert {tuple(row.tolist()) for row in inputs(probe.results[0])} == rows


@BOTH
def test_stand_alone_validation_without_training_data_warns_and_uses_validation_data(tmp_path, package):
    probe = AtHook("on_validation_start", lambda t, m: bridge.training_batches(t, m, 96, seed=0))
    with pytest.warns(UserWarning, match="calibrating on the validation data, because no training data is known"):
        trainer(tmp_path, package, callbacks=[probe]).validate(classifier(package)(), val_loader(), verbose=False)
    assert len(inputs(probe.results[0])) == 48


def test_a_data_module_that_was_not_set_up_for_training_warns(tmp_path):
    class Data(lightning.pytorch.LightningDataModule):
        def setup(self, stage):
            if stage == "fit":
                self.train = blobs()

        def train_dataloader(self):
            return DataLoader(self.train)

        def val_dataloader(self):
            return val_loader()

    probe = AtHook("on_validation_start", lambda t, m: bridge.training_batches(t, m, 16, seed=0))
    with pytest.warns(UserWarning, match=r"Data.train_dataloader\(\) raised AttributeError"):
        trainer(tmp_path, callbacks=[probe]).validate(Classifier(), datamodule=Data(), verbose=False)
    assert probe.results


# ------------------------------------------------------------------------------------------------- second derivatives


def second_derivative(t, m):
    with curvature_safe(m):
        x, y = bridge.training_batches(t, m, 16, seed=0)[0]
        weight = m.net[0].weight
        loss = F.cross_entropy(m(x), y)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        (hv,) = torch.autograd.grad((grad * grad.detach()).sum(), weight)
        return float(hv.norm())


@BOTH
def test_second_derivatives_work_under_stand_alone_validation(tmp_path, package):
    """Lightning runs it in inference mode, where enable_grad alone is not enough."""

    def act(t, m):
        assert torch.is_inference_mode_enabled()
        with torch.enable_grad(), pytest.raises(RuntimeError):
            torch.autograd.grad(m(torch.ones(2, 8)).sum(), m.net[0].weight)
        return second_derivative(t, m)

    class WithData(classifier(package)):
        def train_dataloader(self):
            return train_loader()

    probe, module = AtHook("on_validation_start", act), WithData()
    trainer(tmp_path, package, callbacks=[probe]).validate(module, val_loader(), verbose=False)
    assert probe.results[0] > 0
    trainer(tmp_path, package).fit(module, train_loader(), val_loader())  # nothing was poisoned


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_end"])
def test_second_derivatives_work_inside_fit(tmp_path, hook):
    assert at(hook, second_derivative, tmp_path) > 0


# ------------------------------------------------------------------------------------------------------- quiet loss


class ByHand(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnLoss(ByHand):
    def curvature_loss(self, batch):
        self.log("never", 1.0)
        return self(batch[0]).square().mean()


class Returns(Classifier):
    """A training step that returns whatever the test wants."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, batch_idx):
        return self.what(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("hook", ["on_train_end", "on_validation_start"])
def test_training_step_gives_its_loss_and_leaves_no_trace(tmp_path, hook):
    """Called bare it would raise in the one hook and log train_loss in the other."""

    def act(t, m):
        batch = bridge.training_batches(t, m, 16, seed=0)[0]
        before, training = snapshot(m, t), m.training
        loss = bridge.quiet_loss(m)
        with curvature_safe(m):
            value, again = loss(m, batch), loss(m, batch)
            assert value.requires_grad
            assert snapshot(m, t) == before
            m.eval()
            in_eval_mode = loss(m, batch)
        expected = F.cross_entropy(m(batch[0]), batch[1])
        m.train(training)
        return [float(x.detach()) for x in (value, again, in_eval_mode, expected)]

    value, again, in_eval_mode, expected = at(hook, act, tmp_path)
    assert value == again  # although dropout may be on
    assert in_eval_mode == pytest.approx(expected)


def test_the_fact_that_a_bare_training_step_raises_in_on_train_end(tmp_path):
    def act(t, m):
        with pytest.raises(Exception, match="log"):
            m.training_step(next(iter(train_loader())), 0)
        return True

    assert at("on_train_end", act, tmp_path)


def test_the_users_loss_comes_first_and_the_modules_own_second():
    batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))
    module = OwnLoss().eval()
    given = bridge.quiet_loss(module, lambda m, b: m(b[0]).sum())(module, batch)
    own = bridge.quiet_loss(module)(module, batch)
    assert float(given.detach()) == pytest.approx(float(module(batch[0]).sum().detach()))
    assert float(own.detach()) == pytest.approx(float(module(batch[0]).square().mean().detach()))


def test_a_loss_in_a_mapping_is_accepted():
    module = Returns(lambda loss: {"loss": loss, "other": 1})
    assert bridge.quiet_loss(module)(module, (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))).ndim == 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda loss: None, "got None"),
        (lambda loss: loss.expand(3), r"got float32\[3\]"),
        (lambda loss: loss.detach(), "does not depend on the weights"),
    ],
)
def test_an_unusable_loss_is_refused_with_the_remedy(what, words):
    module = Returns(what)
    with pytest.raises(CalibrationError, match=rf"{words}.*give loss_fn="):
        bridge.quiet_loss(module)(module, (torch.ones(4, 8), torch.zeros(4, dtype=torch.long)))
    assert "log" not in vars(module)


def test_manual_optimisation_is_refused_with_the_remedy():
    with pytest.raises(OptionError, match=r"ByHand optimises by hand.*give loss_fn=.*objective='distill'"):
        bridge.quiet_loss(ByHand())


def test_dataloader_iter_is_refused():
    class Pulls(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(OptionError, match="takes dataloader_iter"):
        bridge.quiet_loss(Pulls())


def test_metrics_that_update_in_place_are_left_as_they_were():
    module = Classifier()
    module.mean, module.all = MeanMetric(), CatMetric()
    module.mean.update(2.0)
    module.all.update(2.0)
    with bridge.undisturbed(module):
        module.mean.update(8.0)
        module.all.update(8.0)
        module.steps += 1
        assert float(module.mean.compute()) == 5.0
    assert float(module.mean.compute()) == 2.0
    assert module.all.compute().reshape(-1).tolist() == [2.0]
    assert float(module.steps) == 0.0


# ---------------------------------------------------------------------------------------------- isolated validation


def own_metrics(module):
    """Accuracy and loss on the validation data, without Lightning."""
    module.eval()
    with torch.inference_mode(False), torch.no_grad():
        x, y = blobs(48, seed=1).tensors
        logits = module(x)
        return {"val_acc": macro(logits.argmax(1), y), "val_loss": float(F.cross_entropy(logits, y))}


def macro(predicted, labels):
    return float(torch.stack([(predicted[labels == c] == c).float().mean() for c in range(3)]).mean())


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
        validate = bridge.isolated_validation(t, m)
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
            return bridge.isolated_validation(t, m)(m)

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
            return bridge.isolated_validation(t, m)(m)

    loader = val_loader(num_workers=1, persistent_workers=True)
    module, probe = Classifier(), AtHook("on_validation_start", act)
    results = trainer(tmp_path, callbacks=[probe]).validate(module, loader, verbose=False)[0]
    assert results == pytest.approx(own_metrics(module))
    assert probe.results[0] == pytest.approx(own_metrics(module))


def test_the_extra_loop_where_validation_never_ran(tmp_path):
    result = at(
        "on_train_end", lambda t, m: bridge.isolated_validation(t, m)(m), tmp_path, max_epochs=1,
        num_sanity_val_steps=0, check_val_every_n_epoch=2,
    )  # fmt: skip
    assert set(result) == {"val_acc", "val_loss"}


def test_shuffled_and_limited_validation_sees_the_same_batches_each_time(tmp_path):
    def act(t, m):
        validate = bridge.isolated_validation(t, m)
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
        result = at("on_train_end", bridge.isolated_validation, tmp_path, None, loaders, limit_val_batches=limit)
    assert result is None


def test_several_loaders_and_forked_metrics_count_once(tmp_path):
    class Forked(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), on_step=True, on_epoch=True)
            self.logger.experiment.add_scalar("anything", 1.0)  # a step may draw on its logger

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    loaders = train_loader(), [val_loader(), val_loader(batch_size=8)]
    result = at(
        "on_train_end", lambda t, m: bridge.isolated_validation(t, m)(m), tmp_path, Forked(), loaders, logger=logger
    )
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
            bridge.isolated_validation(t, m)(m)
        assert snapshot(m, t) == before
        return t.callbacks is callbacks and t.fit_loop.epoch_loop.val_loop is loop

    assert at("on_train_end", act, tmp_path, Fails())


# ------------------------------------------------------------------------------------------------ the trainer, asked


@BOTH
def test_late_averaging_is_warned_of(tmp_path, package):
    swa = package.callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    callback = package.Callback()
    late = trainer(tmp_path, package, callbacks=[callback, swa])
    with pytest.warns(UserWarning, match="StochasticWeightAveraging comes after"):
        trainers.warn_of_late_averaging(late, callback)
    trainers.warn_of_late_averaging(trainer(tmp_path, package, callbacks=[swa, callback]), callback)
