"""Curvature that is measured and logged while a network trains."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lit import AtHook, fit, quantizer, same, weights

from lightning_caq.callback import CurvatureQuantizationCallback

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize(("every", "epochs"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (0, [])])
def test_curvature_is_logged_during_training_and_the_network_not_touched(tmp_path, every, epochs):
    class Watched(CurvatureQuantizationCallback):
        def on_validation_start(self, t, m):
            before, state, flags = weights(m), torch.get_rng_state(), [x.training for x in m.modules()]
            super().on_validation_start(t, m)
            assert same(weights(m), before)
            assert torch.equal(torch.get_rng_state(), state)
            assert [x.training for x in m.modules()] == flags
            assert not torch.is_grad_enabled()

    logger = CSVLogger(tmp_path)
    callback = Watched(avg_bits=3, curvature_samples=24, calibration_samples=48, monitor_every_n_epochs=every)
    fit(tmp_path, callback, max_epochs=4, val_check_interval=0.5, logger=logger)
    assert [each.epoch for each in callback.report.studies.training] == epochs
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
