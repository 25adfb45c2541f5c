"""The metric that max_drop watches: seen before training, and which way is better."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lit import AtHook, Classifier, fit, quantizer, train_loader, trainer, val_loader
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_caq.errors import BudgetError, OptionError

pytestmark = pytest.mark.usefixtures("no_figures")


class Energy(Classifier):
    """Logs its loss under a name that says nothing, and a metric of torchmetrics under another."""

    def __init__(self, metric=None):
        super().__init__()
        self.metric = metric

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("energy", torch.nn.functional.cross_entropy(logits, batch[1]))
        if self.metric is not None:
            self.metric(logits if isinstance(self.metric, MulticlassAccuracy) else logits[:, 0], batch[1])
            self.log("judgement", self.metric)


def watching(monitor, **options):
    return quantizer(**{"avg_bits": None, "max_drop": 0.5, "monitor": monitor, "max_evaluations": 1, **options})


def steps_before_refusal(tmp_path, callback, module, match, **kwargs):
    """How many training steps there were until the fit was refused."""
    steps = AtHook("on_train_batch_end", lambda *args: None)
    steps.on_train_batch_end = lambda *args: steps.results.append(1)
    with pytest.raises((BudgetError, OptionError), match=match):
        fit(tmp_path, callback, module, callbacks=[steps], **kwargs)
    return len(steps.results)


def test_a_metric_that_is_not_logged_is_refused_at_the_sanity_check_or_the_first_validation(tmp_path):
    refused = r"monitor='val_auc' is not among the metrics that validation logs, which are 'val_acc', 'val_loss'; name"
    assert steps_before_refusal(tmp_path, watching("val_auc"), Classifier(), refused) == 0
    assert steps_before_refusal(tmp_path, watching("train_loss"), Classifier(), "'train_loss' is not among") == 0
    late = {"num_sanity_val_steps": 0, "max_epochs": 3}
    assert steps_before_refusal(tmp_path, watching("train_loss"), Classifier(), "'train_loss' is not", **late) == 6
    assert (
        steps_before_refusal(tmp_path, watching("val_acc"), Classifier(), "needs validation", limit_val_batches=0) == 0
    )


def test_a_module_that_logs_nothing_in_the_sanity_check_is_waited_for(tmp_path):
    class Silent(Classifier):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    callback = watching("val_acc")
    fit(tmp_path, callback, Silent())
    assert callback.report.options["monitor_mode"] == "max"


@pytest.mark.parametrize(
    ("module", "monitor", "callbacks", "mode"),
    [
        (lambda: Energy(MulticlassAccuracy(3)), "judgement", [], "max"),
        (lambda: Energy(MeanSquaredError()), "judgement", [], "min"),
        (Energy, "energy", [EarlyStopping("energy", mode="max")], "max"),  # whatever it may be
        (Classifier, "val_loss", [EarlyStopping("val_acc", mode="max")], "min"),
        (Classifier, "val_acc", [], "max"),
    ],
)
def test_the_direction_comes_from_the_metric_a_callback_or_the_name(tmp_path, module, monitor, callbacks, mode):
    callback = watching(monitor, max_drop=100.0)
    fit(tmp_path, callback, module(), callbacks=callbacks)
    assert callback.report.options["monitor_mode"] == mode
    (tmp_path / "again").mkdir()
    given = watching(monitor, max_drop=100.0, monitor_mode={"max": "min", "min": "max"}[mode])
    fit(tmp_path / "again", given, module(), callbacks=callbacks)
    assert given.report.options["monitor_mode"] != mode


def test_nothing_that_tells_is_refused_before_training(tmp_path):
    refused = "Nothing tells whether a good network has a large or a small 'energy'; give monitor_mode='max' or 'min'"
    assert steps_before_refusal(tmp_path, watching("energy"), Energy(), refused) == 0
    fit(tmp_path, watching("energy", monitor_mode="min"), Energy())


def test_validation_alone_finds_the_direction_too(tmp_path):
    class Net(Classifier):
        def __init__(self):
            super().__init__()
            self.judgement = MulticlassAccuracy(3)

        def validation_step(self, batch, batch_idx):
            self.judgement(self(batch[0]), batch[1])
            self.log("judgement", self.judgement)

        def train_dataloader(self):
            return train_loader()

    callback = watching("judgement", max_drop=1.0)
    trainer(tmp_path, callbacks=[callback]).validate(Net(), val_loader(), verbose=False)
    assert callback.report.options["monitor_mode"] == "max"
