"""The callback: when things happen, what is written, and what must not be noticed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lit import AtHook, Classifier, blobs, classifier, train_loader, trainer, val_loader
from torch import nn

from lightning_caq import outputs
from lightning_caq.callback import CurvatureQuantizationCallback
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.swap import quantized_modules

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
LAYERS = {"net.0", "net.4"}
OBJECTIVE_ONLY = {"float/distill", "quantized/distill", "uniform/distill"}
pytestmark = pytest.mark.usefixtures("no_figures")


def quantizer(**options):
    """The callback with little work to do."""
    defaults = {"avg_bits": 3, "calibration_samples": 48, "curvature_samples": 24}
    return CurvatureQuantizationCallback(**({**defaults, **options}))


def fit(folder, callback, module=None, package=lightning.pytorch, **kwargs):
    module = module or classifier(package)()
    callbacks = [callback, *kwargs.pop("callbacks", [])]
    pl_trainer = trainer(folder, package, callbacks=callbacks, **kwargs)
    pl_trainer.fit(module, train_loader(), val_loader())
    return module, pl_trainer


def values_per_row(weight):
    """How many different weights each output channel holds."""
    return max(len(torch.unique(row)) for row in weight.detach())


def is_quantized(module, plan):
    """Judged by the numbers alone: no channel holds more values than its bits can name."""
    return all(values_per_row(module.get_submodule(name).weight) <= 2**bits for name, bits in plan.bits.items())


def is_float(module):
    return not quantized_modules(module) and values_per_row(module.net[0].weight) == 8


def measured_by_hand(module):
    module.eval()
    with torch.no_grad():
        x, y = blobs(48, seed=1).tensors
        logits = module(x)
        right = logits.argmax(1) == y
        accuracy = torch.stack([right[y == c].float().mean() for c in range(3)]).mean()
        return {"val_acc": float(accuracy), "val_loss": float(F.cross_entropy(logits, y))}


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, BudgetError, "no budget"),
        ({"avg_bits": 3, "ratio": 8}, BudgetError, "two budgets"),
        ({"avg_bits": 9}, BudgetError, "avg_bits=9 cannot be met"),
        ({"avg_bits": 3, "method": "magic"}, OptionError, "method='magic' is not known; choose from .*'cet'"),
        ({"avg_bits": 3, "rounding": "up"}, OptionError, "rounding='up'"),
        ({"avg_bits": 3, "objective": "guess"}, OptionError, "objective='guess'"),
        ({"avg_bits": 3, "compare": ["magic"]}, OptionError, "compare='magic'"),
        ({"avg_bits": 3, "loss_fn": "my.loss"}, OptionError, "loss_fn='my.loss' is not a function"),
        ({"avg_bits": 3, "monitor_every_n_epochs": -1}, OptionError, "monitor_every_n_epochs=-1"),
        ({"avg_bits": 3, "on_error": "ignore"}, OptionError, "on_error='ignore' is not known"),
        ({"avg_bits": 3, "time_budget": 0}, OptionError, "time_budget=0 is not allowed"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, words):
    with pytest.raises(error, match=words):
        CurvatureQuantizationCallback(**options)


def test_nothing_is_known_before_a_run():
    callback = quantizer()
    assert (callback.plan, callback.profile, callback.report) == (None, None, None)
    assert callback.state_dict() == {}


def test_it_is_a_callback_of_both_packages():
    assert isinstance(quantizer(), lightning.pytorch.Callback)
    assert isinstance(quantizer(), pytorch_lightning.Callback)
    assert lightning.pytorch.Callback is not pytorch_lightning.Callback


def test_sharded_strategies_are_refused():
    stub = SimpleNamespace(strategy=object.__new__(FSDPStrategy), callbacks=[])
    with pytest.raises(OptionError, match="FSDPStrategy shards the weights"):
        quantizer().setup(stub, None, "fit")


# ------------------------------------------------------------------------------------------------ at the end of fit


@BOTH
def test_fit_ends_with_a_quantized_network_and_a_report(tmp_path, package, capsys):
    callback = quantizer()
    module, t = fit(tmp_path, callback, package=package)
    assert set(callback.plan.bits) == LAYERS
    assert callback.plan.avg_bits <= 3
    assert is_quantized(module, callback.plan)
    assert values_per_row(module.net[0].weight) > 1

    metrics = callback.report.metrics
    assert {key.split("/")[0] for key in metrics} == {"float", "quantized", "uniform"}
    for name, value in measured_by_hand(module).items():
        assert metrics[f"quantized/{name}"] == pytest.approx(value, abs=1e-6)
        assert metrics[f"float/{name}"] == pytest.approx(float(t.callback_metrics[name]), abs=1e-6)

    printed = capsys.readouterr().out
    assert "net.0" in printed
    assert "quantized (cet)" in printed
    saved = QuantizationPlan.load(tmp_path / "caq" / "plan.json")
    assert saved.bits == callback.plan.bits
    assert json.loads((tmp_path / "caq" / "report.json").read_text())["metrics"] == metrics
    assert (tmp_path / "caq" / "layers.csv").exists()


def test_the_parameters_stay_the_same_objects(tmp_path):
    module = Classifier()
    before = {name: id(p) for name, p in module.named_parameters()}
    keys = list(module.state_dict())
    fit(tmp_path, quantizer(), module)
    assert {name: id(p) for name, p in module.named_parameters()} == before
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("batchnorm", ["recentre", "keep"])
def test_nothing_else_changes(tmp_path, batchnorm):
    """One list of everything a user could notice, before and after the work in on_train_end."""

    def notice(t, m):
        return {
            "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),
            "flags": [x.training for x in m.modules()],
            "grads": [p.grad is None for p in m.parameters()],
            "needs grad": [p.requires_grad for p in m.parameters()],
            "grad mode": torch.is_grad_enabled(),
            "metrics": [(x.tp.tolist(), x._update_count) for x in (m.train_acc, m.val_acc)],
            "callback_metrics": {k: float(v) for k, v in t.callback_metrics.items()},
            "progress": str(t.fit_loop.epoch_loop.val_loop.batch_progress),
            "steps": (float(m.steps), t.global_step),
            "state": (str(t.state.fn), str(t.state.stage)),
            "batchnorm": m.net[1].running_mean.tolist() if batchnorm == "keep" else None,
            "log": "log" in vars(m),
        }

    class Watched(CurvatureQuantizationCallback):
        def on_train_end(self, t, m):
            m.net[1].eval()  # a user's frozen batch-norm
            before = notice(t, m)
            super().on_train_end(t, m)
            assert notice(t, m) == before
            assert not m.net[1].training
            assert m.net[0].training

    ends = []
    last = [AtHook("on_fit_end", lambda t, m: ends.append("fit_end"))]
    last[0].teardown = lambda t, m, stage: ends.append(f"teardown {t.state.fn.value}")
    callback = Watched(avg_bits=3, calibration_samples=48, curvature_samples=24, batchnorm=batchnorm, objective="task")
    module, _ = fit(tmp_path, callback, callbacks=last)
    assert is_quantized(module, callback.plan)
    assert ends == ["fit_end", "teardown fit"]


def test_stopping_and_checkpointing_see_float_metrics_only(tmp_path):
    """The extra validation is worse or better than the float one; neither callback may act on it."""
    stop = lightning.pytorch.callbacks.EarlyStopping("val_loss", patience=50)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss")
    logger = CSVLogger(tmp_path)
    callback = quantizer(avg_bits=2, bits=[2])
    _, t = fit(tmp_path, callback, callbacks=[stop, keep], logger=logger, enable_checkpointing=True)
    assert callback.report.metrics["quantized/val_loss"] != callback.report.metrics["float/val_loss"]
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_loss")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert len(logged) == 2  # one an epoch
    assert float(keep.best_model_score) == pytest.approx(min(logged))
    assert float(stop.best_score) == pytest.approx(min(logged))
    assert float(t.callback_metrics["val_loss"]) == pytest.approx(logged[-1])


@pytest.mark.filterwarnings("ignore:.*barebones")
@pytest.mark.parametrize("settings", [{"barebones": True}, {"logger": False}])
def test_it_works_without_loggers(tmp_path, settings):
    if "barebones" in settings:
        settings = {**settings, "log_every_n_steps": None, "logger": None, "enable_checkpointing": None}
        settings |= {"enable_progress_bar": None, "enable_model_summary": None}
    callback = quantizer()
    module, _ = fit(tmp_path, callback, **settings)
    assert is_quantized(module, callback.plan)
    assert (tmp_path / "caq" / "plan.json").exists()


def test_evaluate_false_validates_nothing(tmp_path):
    callback = quantizer(evaluate=False)
    fit(tmp_path, callback)
    assert set(callback.report.metrics) == OBJECTIVE_ONLY


@pytest.mark.filterwarnings("ignore:.*`fast_dev_run`")
def test_fast_dev_run_does_nothing(tmp_path):
    callback = quantizer(monitor_every_n_epochs=1)
    module, t = fit(tmp_path, callback, fast_dev_run=True)
    t.validate(module, val_loader(), verbose=False)
    assert callback.plan is None
    assert is_float(module)


@pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`")
def test_without_validation_data_it_quantizes_all_the_same(tmp_path):
    callback, module = quantizer(), Classifier()
    with pytest.warns(UserWarning, match="no validation data"):
        trainer(tmp_path, callbacks=[callback]).fit(module, train_loader())
    assert is_quantized(module, callback.plan)
    assert set(callback.report.metrics) == OBJECTIVE_ONLY


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precisions(tmp_path, precision):
    class Watched(CurvatureQuantizationCallback):
        def on_train_end(self, t, m):
            m.bias = m.net[4].bias
            dtypes = [x.dtype for x in m.state_dict().values()]
            super().on_train_end(t, m)
            assert [x.dtype for x in m.state_dict().values()] == dtypes
            assert m.net[4].bias is m.bias

    callback = Watched(avg_bits=3, calibration_samples=48, curvature_samples=24, monitor_every_n_epochs=1)
    module, _ = fit(tmp_path, callback, precision=precision)
    assert is_quantized(module, callback.plan)
    assert all(layer.quantizing for layer in quantized_modules(module).values())


def test_layers_can_be_left_out(tmp_path):
    callback = quantizer(exclude=["net.4"])
    module, _ = fit(tmp_path, callback)
    assert set(callback.plan.bits) == {"net.0"}
    assert set(quantized_modules(module)) == {"net.0"}


def test_two_runs_give_the_same_plan(tmp_path):
    plans = []
    for run in range(2):
        torch.manual_seed(3)
        callback = quantizer()
        fit(tmp_path / str(run), callback)
        plans.append(callback.plan)
    assert plans[0].bits == plans[1].bits
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(plans[0].layers, plans[1].layers, strict=True))


# ------------------------------------------------------------------------------------------------------- objectives


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


# --------------------------------------------------------------------------------------------------------- failures


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

    monkeypatch.setattr("lightning_caq.attempt.round_layer", pressed)
    module, callback = Classifier(), quantizer(on_error="warn")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, callback, module)
    assert is_float(module)
    assert callback.plan is None


# ------------------------------------------------------------------------------------------- monitoring during fit


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (0, [])])
def test_curvature_is_logged_during_training_and_the_network_not_touched(tmp_path, every, epochs):
    measured = []

    class Watched(CurvatureQuantizationCallback):
        def _monitor(self, t, m):
            before, state, flags = weights(m), torch.get_rng_state(), [x.training for x in m.modules()]
            last = self._monitored
            super()._monitor(t, m)
            assert same(weights(m), before)
            assert torch.equal(torch.get_rng_state(), state)
            assert [x.training for x in m.modules()] == flags
            assert not torch.is_grad_enabled()
            if self._monitored != last:
                measured.append(t.current_epoch)

    logger = CSVLogger(tmp_path)
    callback = Watched(avg_bits=3, curvature_samples=24, calibration_samples=48, monitor_every_n_epochs=every)
    fit(tmp_path, callback, max_epochs=4, val_check_interval=0.5, logger=logger)
    assert measured == epochs
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert ("caq/training/kappa/net.0" in text) == bool(epochs)
    assert ("caq/training/lipschitz/net.4" in text) == bool(epochs)


def test_kappa_of_a_linear_layer_is_twice_its_largest_singular_value_squared(tmp_path):
    """The closed form, on the weights as they are at the first validation."""
    expected = []
    probe = AtHook(
        "on_validation_start", lambda t, m: expected.append(2 * torch.linalg.svdvals(m.net[4].weight)[0] ** 2)
    )
    logged = {}

    class Spy(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.update({k: v for k, v in metrics.items() if k.startswith("caq/training")})
            super().log_metrics(metrics, step)

    callback = quantizer(monitor_every_n_epochs=1)
    fit(tmp_path, callback, callbacks=[probe], max_epochs=1, logger=Spy(tmp_path))
    assert logged["caq/training/kappa/net.4"] == pytest.approx(float(expected[0].detach()), rel=1e-2)


# ---------------------------------------------------------------------------------------- stand-alone runs, swapping


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
    for name, value in measured_by_hand(module).items():
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
    with pytest.warns(UserWarning, match="has lost its fake-quant layers"):
        t.test(module, val_loader(), verbose=False)


def test_the_last_of_two_callbacks_acts(tmp_path):
    first, last = quantizer(avg_bits=4), quantizer(avg_bits=2)
    with pytest.warns(UserWarning, match="only the last one quantizes"):
        module, _ = fit(tmp_path, first, callbacks=[last])
    assert first.plan is None
    assert is_quantized(module, last.plan)
    assert last.plan.avg_bits == 2
