"""The bridge: training data that are read without disturbing the live loader, and second derivatives on them."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from lit import AtHook, Classifier, at, blobs, classifier, inputs, random_state, train_loader, trainer, val_loader
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_caq.bridge.calibration import training_batches
from lightning_caq.utilities.contexts import curvature_safe

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)


def test_batches_are_a_random_draw_without_repeats(tmp_path):
    batches = at("on_train_end", lambda t, m: training_batches(t, m, 40, seed=0), tmp_path)
    x, y = inputs(batches), torch.cat([b[1] for b in batches])
    assert len(x) == 40
    assert len(torch.unique(x, dim=0)) == 40
    assert set(y.tolist()) == {0, 1, 2}  # the data are sorted by class
    rows = {tuple(row.tolist()) for row in blobs().tensors[0]}
    assert all(tuple(row.tolist()) in rows for row in x)


def test_batches_depend_on_the_seed_alone(tmp_path):
    def twice(t, m):
        first = inputs(training_batches(t, m, 40, seed=0))
        torch.rand(7)
        return (
            first,
            inputs(training_batches(t, m, 40, seed=0)),
            inputs(training_batches(t, m, 40, seed=1)),
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
        training_batches(t, m, 32, seed=0)
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
        "on_validation_start", lambda t, m: training_batches(t, m, 32, seed=0), tmp_path, Counter(),
        (loader, val_loader()), max_epochs=1, val_check_interval=0.5, num_sanity_val_steps=0,
    )  # fmt: skip
    assert counts == list(range(6))


def test_a_custom_sampler_keeps_its_choice_of_data(tmp_path):
    chosen = list(range(10, 30))
    loaders = train_loader(sampler=SubsetRandomSampler(chosen), shuffle=False), val_loader()
    x = inputs(at("on_train_end", lambda t, m: training_batches(t, m, 500, seed=0), tmp_path, None, loaders))
    allowed = {tuple(row.tolist()) for row in blobs().tensors[0][chosen]}
    assert {tuple(row.tolist()) for row in x} == allowed


def test_an_iterable_dataset_is_iterated(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(blobs())

    loaders = DataLoader(Stream(), batch_size=16), val_loader()
    x = inputs(at("on_train_end", lambda t, m: training_batches(t, m, 40, seed=0), tmp_path, None, loaders))
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
        lambda t, m: training_batches(t, m, 32, seed=0),
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
        return training_batches(t, m, 16, seed=0), m.calls

    batches, calls = at("on_train_end", act, tmp_path, Shifted(), precision="64-true")
    assert calls == ("before", "after")
    assert batches[0][0].dtype == torch.float64


def test_stand_alone_validation_finds_the_training_data_of_the_module(tmp_path):
    class WithData(Classifier):
        def train_dataloader(self):
            return train_loader()

    probe = AtHook("on_validation_start", lambda t, m: training_batches(t, m, 96, seed=0))
    trainer(tmp_path, callbacks=[probe]).validate(WithData(), val_loader(), verbose=False)
    rows = {tuple(row.tolist()) for row in blobs().tensors[0]}
    assert {tuple(row.tolist()) for row in inputs(probe.results[0])} == rows


@BOTH
def test_stand_alone_validation_without_training_data_warns_and_uses_validation_data(tmp_path, package):
    probe = AtHook("on_validation_start", lambda t, m: training_batches(t, m, 96, seed=0))
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

    probe = AtHook("on_validation_start", lambda t, m: training_batches(t, m, 16, seed=0))
    with pytest.warns(UserWarning, match=r"Data.train_dataloader\(\) raised AttributeError"):
        trainer(tmp_path, callbacks=[probe]).validate(Classifier(), datamodule=Data(), verbose=False)
    assert probe.results


def second_derivative(t, m):
    with curvature_safe(m):
        x, y = training_batches(t, m, 16, seed=0)[0]
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
