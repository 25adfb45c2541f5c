"""When the callback acts and when it does not: every way in which a run of Lightning starts, stops and is cut short."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelPruning, StochasticWeightAveraging
from lit import Classifier, classifier, train_loader, trainer, val_loader

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

BOTH = pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning], ids=lambda p: p.__name__)
pytestmark = pytest.mark.usefixtures("no_figures")


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    defaults = {"avg_bits": 3, "calibration_samples": 24, "curvature_samples": 8, "eigenpairs": 4, "compare": []}
    return CurvatureQuantizationCallback(**{**defaults, "guard": False, **options})


def is_quantized(module: Any, callback: Any) -> bool:
    """Judged by the numbers: no channel holds more values than its bits can name."""
    weights = {name: module.get_submodule(name).weight.detach() for name in callback.plan.bits} if callback.plan else {}
    return bool(weights) and all(
        len(row.unique()) <= 2 ** callback.plan.bits[n] for n, w in weights.items() for row in w
    )


STOPS = {
    "max_epochs": ({"max_epochs": 1}, []),
    "max_steps": ({"max_epochs": -1, "max_steps": 3}, []),
    "max_time": ({"max_epochs": -1, "max_time": timedelta(seconds=0.05)}, []),
    "early stopping": ({"max_epochs": 50}, [lambda: EarlyStopping("val_loss", stopping_threshold=100.0)]),
    "no sanity check": ({"max_epochs": 1, "num_sanity_val_steps": 0}, []),
    "whole sanity check": ({"max_epochs": 1, "num_sanity_val_steps": -1}, []),
    "validation in mid-epoch": ({"max_epochs": 1, "val_check_interval": 0.5}, []),
    "validation never reached": ({"max_epochs": 1, "check_val_every_n_epoch": 5}, []),
    "accumulated gradients": ({"max_epochs": 1, "accumulate_grad_batches": 4}, []),
    "detect anomaly": ({"max_epochs": 1, "detect_anomaly": True}, []),
}


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_training_that_stops_by_itself_ends_quantized(tmp_path, how):
    settings, more = STOPS[how]
    callback, module = quantizer(), Classifier()
    t = trainer(tmp_path, callbacks=[callback, *(make() for make in more)], **settings)
    t.fit(module, train_loader(), val_loader())
    assert t.global_step > 0
    assert is_quantized(module, callback)
    assert "quantized/val_loss" in callback.report.metrics


@pytest.mark.filterwarnings("ignore:`Trainer.limit_train_batches=0`|.*`max_epochs=0`|.*limit_train_batches")
@pytest.mark.parametrize("settings", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}], ids=str)
def test_where_nothing_is_trained_nothing_is_quantized_until_validate(tmp_path, settings):
    callback, module = quantizer(), Classifier()
    t = trainer(tmp_path, callbacks=[callback], **settings)
    t.fit(module, train_loader(), val_loader())
    assert callback.plan is None
    assert not quantized_modules(module)
    module.train_dataloader = train_loader
    after = trainer(tmp_path, callbacks=[callback])
    after.validate(module, val_loader(), verbose=False)
    assert is_quantized(module, callback)


@pytest.mark.filterwarnings("ignore:.*limit_.*_batches")
def test_no_validation_batches_are_said_and_the_rest_is_done(tmp_path):
    callback, module = quantizer(), Classifier()
    with pytest.warns(UserWarning, match="no validation data"):
        trainer(tmp_path, callbacks=[callback], limit_val_batches=0, max_epochs=1).fit(
            module, train_loader(), val_loader()
        )
    assert is_quantized(module, callback)
    assert not any("val_loss" in name for name in callback.report.metrics)


@pytest.mark.filterwarnings("ignore:.*limit_.*_batches")
@pytest.mark.parametrize("use", ["test", "predict"])
def test_a_test_of_no_batches_breaks_nothing(tmp_path, use):
    callback, module = quantizer(), Classifier()
    t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    t.fit(module, train_loader(), val_loader())
    again = trainer(tmp_path, callbacks=[callback], **{f"limit_{use}_batches": 0})
    getattr(again, use)(module, val_loader())
    assert is_quantized(module, callback)


@pytest.mark.filterwarnings("ignore:.*lr_find.*|.*`tuner`.*|.*Plotting.*")
def test_a_search_for_the_learning_rate_quantizes_nothing(tmp_path):
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.02

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    callback, module = quantizer(), Tuned()
    t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    lightning.pytorch.tuner.Tuner(t).lr_find(module, train_loader(), val_loader(), num_training=5)
    assert callback.plan is None
    assert not quantized_modules(module)
    t.fit(module, train_loader(), val_loader())
    assert is_quantized(module, callback)


def test_a_search_for_the_batch_size_quantizes_nothing(tmp_path):
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self) -> Any:
            return train_loader(batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return val_loader()

    callback, module = quantizer(), Sized()
    t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    found = lightning.pytorch.tuner.Tuner(t).scale_batch_size(module, max_trials=2, steps_per_trial=1)
    assert found == module.batch_size > 2
    assert callback.plan is None
    assert not quantized_modules(module)


def test_a_second_fit_of_a_trainer_that_is_at_its_end_changes_nothing(tmp_path):
    """Lightning trains nothing then and does not call ``on_train_end``."""
    callback, module = quantizer(), Classifier()
    t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    t.fit(module, train_loader(), val_loader())
    plan, state = callback.plan, {name: x.clone() for name, x in module.state_dict().items()}
    t.fit(module, train_loader(), val_loader())
    assert callback.plan is plan
    assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())


def test_the_sanity_check_measures_nothing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lightning_caq.bridge.monitoring.training_figures", lambda t, m, o: calls.append(t.current_epoch) or {}
    )
    callback = quantizer(monitor_every_n_epochs=1)
    trainer(tmp_path, callbacks=[callback], max_epochs=2, num_sanity_val_steps=2).fit(
        Classifier(), train_loader(), val_loader()
    )
    assert calls == [0, 1]


LATE = {
    "SWA": lambda package: package.callbacks.StochasticWeightAveraging(swa_lrs=0.1),
    "pruning": lambda package: package.callbacks.ModelPruning("l1_unstructured", amount=0.5),
    "EMA": lambda package: package.callbacks.EMAWeightAveraging(),
}


@BOTH
@pytest.mark.parametrize("late", LATE)
def test_callbacks_that_change_weights_after_us_are_warned_of(tmp_path, package, late):
    if late == "EMA" and not hasattr(package.callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    other, callback = LATE[late](package), quantizer()
    wrong = trainer(tmp_path, package, callbacks=[callback, other], max_epochs=1)
    with pytest.warns(UserWarning, match=f"{type(other).__bases__[0].__name__}|{type(other).__name__} comes after"):
        callback.setup(wrong, classifier(package)(), "fit")
    right = trainer(tmp_path, package, callbacks=[other, callback], max_epochs=1)
    callback.setup(right, classifier(package)(), "fit")  # warnings are errors


EARLY: dict[str, tuple[Any, dict[str, Any]]] = {
    "SWA": (lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), {"max_epochs": 3}),
    "pruning": (lambda: ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False), {}),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler|.*`lr_scheduler.step..` before")
@pytest.mark.parametrize("early", EARLY)
def test_callbacks_ahead_of_us_have_done_their_work(tmp_path, early):
    """SWA has written its average and pruning made its zeros permanent before the network is quantized."""
    make, settings = EARLY[early]
    seen: dict[str, Any] = {}

    class Watched(CurvatureQuantizationCallback):
        def on_train_end(self, t: Any, m: Any) -> None:
            seen["before"] = m.net[0].weight.detach().clone()
            super().on_train_end(t, m)

    callback = Watched(avg_bits=3)
    callback.__dict__.update(quantizer().__dict__)
    module = Classifier()
    trainer(tmp_path, callbacks=[make(), callback], **settings).fit(module, train_loader(), val_loader())
    assert is_quantized(module, callback)
    if early == "pruning":
        zeros = seen["before"] == 0
        assert zeros.float().mean() > 0.3
        assert not hasattr(module.net[0], "weight_mask")
        assert (module.net[0].weight[zeros] == 0).all()  # nought is on every grid


def test_a_callback_added_by_the_module_acts(tmp_path):
    class Brings(Classifier):
        def configure_callbacks(self) -> list[Callback]:
            return [callback]

    callback, module = quantizer(), Brings()
    trainer(tmp_path, max_epochs=1).fit(module, train_loader(), val_loader())
    assert is_quantized(module, callback)
