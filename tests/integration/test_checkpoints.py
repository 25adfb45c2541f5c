"""Everything a user does with checkpoints once the callback has quantized the network."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit import AtHook, Classifier, blobs, classifier, train_loader, trainer, val_loader

from lightning_caq.bridge.checkpoints import LATENT
from lightning_caq.callback import CurvatureQuantizationCallback
from lightning_caq.errors import PlanError
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
# Lightning's own, for every callback of the first run that a later Trainer was not given.
pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
FLOAT_WEIGHTS = pytest.mark.filterwarnings("ignore:.*do not lie on its grids|caq. test runs the float network")


def quantizer(**options):
    return CurvatureQuantizationCallback(
        **{"avg_bits": 2.5, "bits": [2, 3], "calibration_samples": 48, "curvature_samples": 24, **options}
    )


def outputs(module):
    module.eval()
    with torch.no_grad():
        return module(blobs(48, seed=1).tensors[0])


def values_per_row(module):
    return max(len(torch.unique(row)) for row in module.net[0].weight.detach())


class Fitted:
    """A network that was fitted and quantized with checkpoints on the way."""

    def __init__(self, folder, package=lightning.pytorch, **kwargs):
        self.folder, self.package = folder, package
        self.callback = quantizer()
        self.keep = package.callbacks.ModelCheckpoint(folder / "ckpt", monitor="val_loss", save_top_k=1, save_last=True)
        self.module = classifier(package)()
        self.trainer = self.new_trainer(self.callback, self.keep, **kwargs)
        self.trainer.fit(self.module, train_loader(), val_loader())
        self.quantized = self.folder / "quantized.ckpt"
        self.trainer.save_checkpoint(self.quantized)
        self.outputs = outputs(self.module)

    def new_trainer(self, *callbacks, **kwargs):
        kwargs = {"enable_checkpointing": True, **kwargs}
        if not any(isinstance(c, self.package.callbacks.ModelCheckpoint) for c in callbacks):
            kwargs["enable_checkpointing"] = False
        return trainer(self.folder, self.package, callbacks=list(callbacks), **kwargs)


@pytest.fixture
def fitted(tmp_path):
    return Fitted(tmp_path)


@BOTH
def test_test_validate_and_predict_use_the_quantized_network(tmp_path, package):
    fitted = Fitted(tmp_path, package)
    t, plan = fitted.trainer, fitted.callback.plan
    predictions = torch.cat(t.predict(fitted.module, val_loader()))
    assert torch.equal(predictions, fitted.outputs)
    labels = blobs(48, seed=1).tensors[1]
    expected = float(torch.nn.functional.cross_entropy(fitted.outputs, labels))
    assert t.test(fitted.module, val_loader(), verbose=False)[0]["test_loss"] == pytest.approx(expected)
    assert t.validate(fitted.module, val_loader(), verbose=False)[0]["val_loss"] == pytest.approx(expected)
    assert fitted.callback.plan is plan
    assert values_per_row(fitted.module) <= 8


@BOTH
@pytest.mark.filterwarnings("ignore:caq. predict runs the float network")
def test_the_best_checkpoint_is_float_and_runs_as_float_with_a_warning(tmp_path, package):
    fitted = Fitted(tmp_path, package)
    state = torch.load(fitted.keep.best_model_path, weights_only=True)["state_dict"]
    with (
        pytest.warns(UserWarning, match=r"test runs the float network.* lies in .*ckpt.quantized\.ckpt"),
        pytest.warns(UserWarning, match="do not lie on its grids"),
    ):
        result = fitted.trainer.test(ckpt_path="best", dataloaders=val_loader(), verbose=False)[0]
    plain = classifier(package)()
    plain.load_state_dict(state)
    labels = blobs(48, seed=1).tensors[1]
    expected = float(torch.nn.functional.cross_entropy(outputs(plain), labels))
    assert result["test_loss"] == pytest.approx(expected)
    assert result["test_loss"] == pytest.approx(float(fitted.keep.best_model_score), abs=1e-6)
    assert torch.equal(outputs(fitted.module), outputs(plain))
    # what follows an odd load goes on working
    assert len(fitted.trainer.predict(fitted.module, val_loader())) == 3


@FLOAT_WEIGHTS
def test_fit_after_a_float_checkpoint_quantizes_afresh(fitted):
    fitted.trainer.test(ckpt_path="best", dataloaders=val_loader(), verbose=False)
    plan = fitted.callback.plan
    fitted.module.train()
    fitted.new_trainer(fitted.callback, max_epochs=1).fit(fitted.module, train_loader(), val_loader())
    assert fitted.callback.plan is not plan
    assert fitted.callback.plan.fingerprint != plan.fingerprint
    assert values_per_row(fitted.module) <= 8
    assert all(rounding_state(layer).quantizing for layer in quantized_modules(fitted.module).values())


def test_a_quantized_checkpoint_brings_its_plan_to_a_fresh_network(fitted):
    torch.load(fitted.quantized, weights_only=True)  # plain containers and tensors only
    fresh, callback = Classifier(), quantizer(avg_bits=3)  # other options: the plan in the checkpoint counts
    results = fitted.new_trainer(callback).validate(fresh, val_loader(), ckpt_path=fitted.quantized, verbose=False)
    assert torch.equal(outputs(fresh), fitted.outputs)
    assert set(quantized_modules(fresh)) == {"net.0", "net.4"}
    assert callback.plan.bits == fitted.callback.plan.bits
    assert callback.report.to_json() == fitted.callback.report.to_json()
    assert callback.profile == fitted.callback.profile
    assert results[0]["val_loss"] == pytest.approx(callback.report.metrics["quantized/val_loss"])


def test_without_the_callback_a_quantized_checkpoint_gives_the_same_outputs(fitted):
    fresh = Classifier()
    fitted.new_trainer().validate(fresh, val_loader(), ckpt_path=fitted.quantized, verbose=False)
    assert not quantized_modules(fresh)
    assert torch.allclose(outputs(fresh), fitted.outputs, atol=1e-5)


def test_load_from_checkpoint_gives_the_quantized_outputs_in_plain_layers(fitted):
    loaded = Classifier.load_from_checkpoint(fitted.quantized)
    assert torch.allclose(outputs(loaded), fitted.outputs, atol=1e-5)
    assert values_per_row(loaded) <= 8
    best = Classifier.load_from_checkpoint(fitted.keep.best_model_path)
    assert not torch.allclose(outputs(best), fitted.outputs, atol=1e-5)


@pytest.mark.skipif("on_train_end" not in vars(ModelCheckpoint), reason="Lightning before 2.5.6 writes it in training")
def test_the_last_checkpoint_may_be_written_after_quantization(tmp_path):
    """ModelCheckpoint runs after every other callback, in on_train_end too (a fact of Lightning that users meet)."""
    keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_epochs=100, save_on_train_epoch_end=False)
    module, callback = Classifier(), quantizer()
    fitted = trainer(tmp_path, callbacks=[callback, keep], enable_checkpointing=True)
    fitted.fit(module, train_loader(), val_loader())
    last = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.allclose(outputs(last), outputs(module), atol=1e-5)


def test_resuming_from_a_float_checkpoint_quantizes_at_the_end(fitted):
    fresh, callback = Classifier(), quantizer()
    t = fitted.new_trainer(callback, max_epochs=4)
    t.fit(fresh, train_loader(), val_loader(), ckpt_path=fitted.keep.best_model_path)
    assert callback.plan is not None
    assert values_per_row(fresh) <= 8


def test_resuming_from_a_quantized_checkpoint_trains_the_quantized_network_on(fitted):
    fresh, callback = Classifier(), quantizer()
    t = fitted.new_trainer(callback, max_epochs=4)
    t.fit(fresh, train_loader(), val_loader(), ckpt_path=fitted.quantized)
    assert callback.plan.bits == fitted.callback.plan.bits
    grids = zip(callback.plan.layers, fitted.callback.plan.layers, strict=True)
    assert all(torch.equal(a.grid.scale, b.grid.scale) for a, b in grids)  # trained on the same grid
    assert any(
        (a.codes != b.codes).any() for a, b in zip(callback.plan.layers, fitted.callback.plan.layers, strict=True)
    )
    assert values_per_row(fresh) <= 8
    assert any("trained on" in note for note in callback.report.notes)


def test_a_second_fit_trains_on_and_settles_on_the_grid(fitted):
    report = fitted.callback.report
    seen = []
    watch = AtHook("on_train_epoch_end", lambda t, m: seen.append(values_per_row(m)))
    fitted.module.train()
    t = fitted.new_trainer(fitted.callback, watch, max_epochs=3)
    t.fit(fitted.module, train_loader(), val_loader())
    assert min(seen) == 8  # the latent weights are free, and the gradients reach them
    assert values_per_row(fitted.module) <= 8
    found = outputs(fitted.module)
    labels = blobs(48, seed=1).tensors[1]
    metrics = fitted.callback.report.metrics
    assert metrics["quantized/val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(found, labels)))
    assert metrics["quantized/val_loss"] == pytest.approx(float(t.callback_metrics["val_loss"]), abs=1e-5)
    assert metrics["float/val_loss"] == report.metrics["float/val_loss"]
    fresh = Classifier()
    fresh.load_state_dict(fitted.module.state_dict())
    assert torch.allclose(outputs(fresh), found, atol=1e-5)


def test_a_checkpoint_of_the_second_fit_holds_the_network_that_was_validated(fitted):
    """Its parameters are off the grid; what was validated, and what is loaded, is on it."""
    path = fitted.folder / "second.ckpt"

    def save(t, m):
        t.save_checkpoint(path)
        latent.append(m.net[0].weight.detach().clone())
        return outputs(m)

    latent = []
    watch = AtHook("on_validation_end", save)
    fitted.module.train()
    fitted.new_trainer(fitted.callback, watch, max_epochs=1).fit(fitted.module, train_loader(), val_loader())
    assert torch.allclose(outputs(Classifier.load_from_checkpoint(path)), watch.results[-1], atol=1e-5)
    assert torch.equal(torch.load(path, weights_only=True)[LATENT]["net.0.weight"], latent[-1])

    at_start = AtHook("on_train_start", lambda t, m: m.net[0].weight.detach().clone())
    resumed, callback = Classifier(), quantizer()
    t = fitted.new_trainer(callback, at_start, max_epochs=2)
    t.fit(resumed, train_loader(), val_loader(), ckpt_path=path)
    assert torch.equal(at_start.results[0], latent[-1])  # resuming goes on from the parameters themselves
    assert values_per_row(resumed) <= 8


def test_a_weights_only_checkpoint_loads_as_a_float_network_with_quantized_values(fitted):
    path = fitted.folder / "weights.ckpt"
    fitted.trainer.save_checkpoint(path, weights_only=True)
    fresh = Classifier()
    fitted.new_trainer().validate(fresh, val_loader(), ckpt_path=path, verbose=False)
    assert not quantized_modules(fresh)
    assert torch.allclose(outputs(fresh), fitted.outputs, atol=1e-5)


def test_a_checkpoint_with_a_plan_and_other_weights_runs_as_float(fitted):
    checkpoint = torch.load(fitted.quantized, weights_only=True)
    checkpoint["state_dict"]["net.0.weight"] += 0.01
    torch.save(checkpoint, fitted.quantized)
    fresh, callback = Classifier(), quantizer()
    with (
        pytest.warns(UserWarning, match="predict runs the float network"),
        pytest.warns(UserWarning, match="do not lie on the plan's grid"),
    ):
        fitted.new_trainer(callback).predict(fresh, val_loader(), ckpt_path=fitted.quantized)
    assert not quantized_modules(fresh)
    assert callback.plan is None


def test_a_checkpoint_of_a_later_version_is_refused(fitted):
    checkpoint = torch.load(fitted.quantized, weights_only=True)
    (state,) = [x for key, x in checkpoint["callbacks"].items() if key.startswith("CurvatureQuantizationCallback")]
    state["version"] = 2
    torch.save(checkpoint, fitted.quantized)
    with pytest.raises(PlanError, match="quantization of version 2; version 1 is known"):
        fitted.new_trainer(quantizer()).predict(Classifier(), val_loader(), ckpt_path=fitted.quantized)


@pytest.mark.filterwarnings("ignore:You are using `torch.load` with `weights_only=False`:FutureWarning")  # torch 2.4
def test_copies_and_pickles_of_the_quantized_network_work(fitted):
    for twin in (copy.deepcopy(fitted.module), pickle.loads(pickle.dumps(fitted.module.net))):
        assert set(quantized_modules(twin))
    assert torch.equal(outputs(copy.deepcopy(fitted.module)), fitted.outputs)
