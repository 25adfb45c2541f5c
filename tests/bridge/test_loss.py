"""The bridge: the loss of any module, without its side effects."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lit import Classifier, at, snapshot, train_loader
from torchmetrics import CatMetric, MeanMetric

from lightning_caq.bridge.calibration import training_batches
from lightning_caq.bridge.loss import quiet_loss
from lightning_caq.bridge.undisturbed import undisturbed
from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.utilities.contexts import curvature_safe


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
        batch = training_batches(t, m, 16, seed=0)[0]
        before, training = snapshot(m, t), m.training
        loss = quiet_loss(m)
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
    given = quiet_loss(module, lambda m, b: m(b[0]).sum())(module, batch)
    own = quiet_loss(module)(module, batch)
    assert float(given.detach()) == pytest.approx(float(module(batch[0]).sum().detach()))
    assert float(own.detach()) == pytest.approx(float(module(batch[0]).square().mean().detach()))


class Takes1(Classifier):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class Takes3(Classifier):
    def training_step(self, batch, batch_idx, dataloader_idx):
        assert (batch_idx, dataloader_idx) == (0, 0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Takes1, Classifier, Takes3])
def test_training_step_gets_the_indices_that_it_takes(kind):
    module, batch = kind().eval(), (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))
    expected = F.cross_entropy(module(batch[0]), batch[1])
    assert float(quiet_loss(module)(module, batch).detach()) == pytest.approx(float(expected.detach()))


def test_modules_inside_the_module_log_nothing_either():
    """Without a trainer Lightning would warn of each ``log``, and warnings are errors here."""

    class Outer(Classifier):
        def __init__(self):
            super().__init__()
            self.inner = Classifier()

        def training_step(self, batch, batch_idx):
            return self.inner.training_step(batch, batch_idx)

    module = Outer()
    loss = quiet_loss(module)(module, (torch.ones(4, 8), torch.zeros(4, dtype=torch.long)))
    assert loss.requires_grad
    assert "log" not in vars(module.inner)
    assert float(module.inner.steps) == 0


def test_a_loss_in_a_mapping_is_accepted():
    module = Returns(lambda loss: {"loss": loss, "other": 1})
    assert quiet_loss(module)(module, (torch.ones(4, 8), torch.zeros(4, dtype=torch.long))).ndim == 0


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
        quiet_loss(module)(module, (torch.ones(4, 8), torch.zeros(4, dtype=torch.long)))
    assert "log" not in vars(module)


def test_manual_optimisation_is_refused_with_the_remedy():
    with pytest.raises(OptionError, match=r"ByHand optimises by hand.*give loss_fn=.*objective='distill'"):
        quiet_loss(ByHand())


def test_dataloader_iter_is_refused():
    class Pulls(Classifier):
        def training_step(self, dataloader_iter):
            return None

    with pytest.raises(OptionError, match="takes dataloader_iter"):
        quiet_loss(Pulls())


def test_metrics_that_update_in_place_are_left_as_they_were():
    module = Classifier()
    module.mean, module.all = MeanMetric(), CatMetric()
    module.mean.update(2.0)
    module.all.update(2.0)
    with undisturbed(module):
        module.mean.update(8.0)
        module.all.update(8.0)
        module.steps += 1
        assert float(module.mean.compute()) == 5.0
    assert float(module.mean.compute()) == 2.0
    assert module.all.compute().reshape(-1).tolist() == [2.0]
    assert float(module.steps) == 0.0
