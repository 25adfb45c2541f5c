"""The callback at the end of a fit: what is written, and what must not be noticed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lit import (
    AtHook,
    Classifier,
    fit,
    is_float,
    is_quantized,
    own_metrics,
    quantizer,
    train_loader,
    trainer,
    val_loader,
    values_per_row,
)

from lightning_caq.callback import CurvatureQuantizationCallback
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
LAYERS = {"net.0", "net.4"}
OBJECTIVE_ONLY = {"float/distill", "quantized/distill", "uniform/distill"}
pytestmark = pytest.mark.usefixtures("no_figures")


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
    for name, value in own_metrics(module).items():
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
    assert all(rounding_state(layer).quantizing for layer in quantized_modules(module).values())


def test_layers_can_be_left_out(tmp_path):
    callback = quantizer(exclude=["net.4"])
    module, _ = fit(tmp_path, callback)
    assert set(callback.plan.bits) == {"net.0"}
    assert set(quantized_modules(module)) == {"net.0"}


def test_too_little_time_means_fewer_samples(tmp_path):
    callback = quantizer(time_budget=1e-9)
    module, _ = fit(tmp_path, callback)
    assert callback.profile.samples == 1
    assert is_quantized(module, callback.plan)


def test_two_runs_give_the_same_plan(tmp_path):
    plans = []
    for run in range(2):
        torch.manual_seed(3)
        callback = quantizer()
        fit(tmp_path / str(run), callback)
        plans.append(callback.plan)
    assert plans[0].bits == plans[1].bits
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(plans[0].layers, plans[1].layers, strict=True))
