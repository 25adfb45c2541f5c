"""The callback with each objective, where something fails, and in runs of their own after or without a fit."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lit import (
    AtHook,
    Classifier,
    classifier,
    fit,
    is_float,
    is_quantized,
    own_metrics,
    quantizer,
    same,
    train_loader,
    trainer,
    val_loader,
    values_per_row,
    weights,
)
from torch import nn

from lightning_caq.bridge import outputs
from lightning_caq.callback import CurvatureQuantizationCallback
from lightning_caq.errors import OptionError
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
LAYERS = {"net.0", "net.4"}
pytestmark = pytest.mark.usefixtures("no_figures")


def by_hand_loss(module, batch):
    return F.cross_entropy(module(batch[0]), batch[1])


class ByHand(Classifier):
    """Optimises by hand: its training_step moves the weights."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(by_hand_loss(self, batch))
        optimizer.step()


def test_the_task_objective_takes_the_loss_of_training_step(tmp_path):
    callback = quantizer(objective="task")
    module, _ = fit(tmp_path, callback)
    assert callback.profile.objective == "task"
    assert is_quantized(module, callback.plan)


def test_a_given_loss_gives_what_the_training_step_gives(tmp_path):
    found = []
    for index, loss_fn in enumerate((None, by_hand_loss)):
        torch.manual_seed(0)
        callback = quantizer(objective="task", loss_fn=loss_fn)
        fit(tmp_path / str(index), callback)
        found.append(callback.profile.eigenvalues)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(found[0]) > 0


def test_manual_optimisation_needs_a_loss(tmp_path):
    refused, module = quantizer(objective="task"), ByHand()
    with pytest.raises(OptionError, match="optimises by hand"):
        fit(tmp_path, refused, module)
    assert refused.plan is None
    assert is_float(module)
    callback = quantizer(objective="task", loss_fn=by_hand_loss)
    module, _ = fit(tmp_path, callback, ByHand())
    assert is_quantized(module, callback.plan)


def test_a_failure_in_validation_leaves_the_float_network(tmp_path):
    class Fails(Classifier):
        before = None

        def on_train_end(self):  # runs after the callback's hook
            raise AssertionError("never reached")

        def validation_step(self, batch, batch_idx):
            if self.before is not None and values_per_row(self.net[0].weight) < 8:
                raise RuntimeError("the quantized network is not to my taste")
            super().validation_step(batch, batch_idx)

    class Watched(CurvatureQuantizationCallback):
        def on_train_end(self, t, m):
            m.before = weights(m)
            super().on_train_end(t, m)

    module, callback = Fails(), Watched(avg_bits=3, calibration_samples=48, curvature_samples=24)
    with pytest.raises(RuntimeError, match="not to my taste"):
        fit(tmp_path, callback, module)
    assert is_float(module)
    assert same(weights(module), module.before)
    assert callback.plan is None
    assert module(torch.zeros(2, 8)).shape == (2, 3)


def test_a_full_disk_leaves_the_float_network(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(outputs, "write_outputs", full)
    module, callback = Classifier(), quantizer()
    with pytest.raises(OSError, match="No space"):
        fit(tmp_path, callback, module)
    assert is_float(module)
    assert callback.plan is None


def test_a_failure_may_be_a_warning_and_training_ends_as_ever(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(outputs, "write_outputs", full)
    ended, callback = AtHook("on_fit_end", lambda t, m: True), quantizer(on_error="warn")
    with pytest.warns(UserWarning, match="quantization failed .OSError: No space left on device"):
        module, pl_trainer = fit(tmp_path, callback, callbacks=[ended])
    assert is_float(module)
    assert callback.plan is None
    assert pl_trainer.state.finished
    assert ended.results


def test_interrupting_the_analysis_leaves_the_float_network(tmp_path, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_caq.selection.candidate.round_layer", pressed)
    module, callback = Classifier(), quantizer(on_error="warn")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, callback, module)
    assert is_float(module)
    assert callback.plan is None


@BOTH
def test_validate_quantizes_first_and_only_once(tmp_path, package):
    class WithData(classifier(package)):
        def train_dataloader(self):
            return train_loader()

    callback, module = quantizer(), WithData()
    trainer(tmp_path, package).fit(module, train_loader(), val_loader())
    expected = trainer(tmp_path, package).validate(module, val_loader(), verbose=False)[0]
    t = trainer(tmp_path, package, callbacks=[callback])
    results = t.validate(module, val_loader(), verbose=False)[0]
    plan = callback.plan
    assert is_quantized(module, plan)
    for name, value in own_metrics(module).items():
        assert results[name] == pytest.approx(value, abs=1e-6)
        assert callback.report.metrics[f"quantized/{name}"] == pytest.approx(value, abs=1e-6)
        assert callback.report.metrics[f"float/{name}"] == pytest.approx(expected[name], abs=1e-6)
    assert t.validate(module, val_loader(), verbose=False)[0] == pytest.approx(results)
    assert callback.plan is plan
    module.train()
    trainer(tmp_path, package).fit(module, train_loader(), val_loader())  # inference mode poisoned nothing


def test_a_rebuilt_network_is_swapped_again_or_said_to_be_lost(tmp_path):
    """configure_model runs again for every later run; one that rebuilds its layers loses the swap."""

    module, callback = Classifier(), quantizer()
    _, t = fit(tmp_path, callback, module)
    expected = t.predict(module, val_loader())
    bias = module.net[0].bias.detach().clone()
    module.net[0] = nn.Linear(8, 16)
    module.net[4].__class__ = nn.Linear
    module.net[0].load_state_dict({"weight": callback.plan.layers[0].values, "bias": bias})
    found = t.predict(module, val_loader())
    assert set(quantized_modules(module)) == LAYERS
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))

    for layer in (0, 4):
        module.net[layer] = nn.Linear(*reversed(module.net[layer].weight.shape))
    with (
        pytest.warns(UserWarning, match="test runs the float network, not a quantized one"),
        pytest.warns(UserWarning, match="has lost its fake-quant layers"),
    ):
        t.test(module, val_loader(), verbose=False)


def test_the_last_of_two_callbacks_acts(tmp_path):
    first, last = quantizer(avg_bits=4), quantizer(avg_bits=2)
    with pytest.warns(UserWarning, match="only the last one quantizes"):
        module, _ = fit(tmp_path, first, callbacks=[last])
    assert first.plan is None
    assert is_quantized(module, last.plan)
    assert last.plan.avg_bits == 2
