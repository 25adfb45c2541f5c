"""Changes of the loss on a few samples against the changes on all of them."""

import pytest
import torch
from torch import nn

from lightning_caq.measures.hessian import loss_sample
from lightning_caq.measures.hessian.loss_sample import affordable_samples, draw_loss_sample
from lightning_caq.measures.measurement import Measurement
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective

SAMPLES = 40


def _setup(seed=0, objective="distill"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batches = list((3 * torch.randn(SAMPLES, 4, dtype=torch.float64)).split(15))
    layers = find_layers(net, batches[0])

    def loss(model, batch):
        return model(batch).square().mean()

    return Measurement(net, layers, make_objective(objective, net, batches, loss), seed=seed)


def _delta(measurement):
    return 0.5 * torch.randn(measurement.layers[0].shape, generator=torch.Generator().manual_seed(1)).double()


def test_changes_are_right_in_the_mean_over_draws(monkeypatch):
    monkeypatch.setattr(loss_sample, "affordable_samples", lambda layers, samples: 6)
    delta = _delta(_setup())
    for energies in (None, torch.rand(SAMPLES).double() ** 3):
        changes = []
        for seed in range(300):
            m = _setup(seed)
            changes.append(draw_loss_sample(m, energies).change(m.model, m.layers[0], delta))
        changes = torch.tensor(changes)
        m = _setup()
        with torch.no_grad():
            m.model[0].weight.add_(delta)
            actual = m.objective.value(m.model)
        assert abs(float(changes.mean()) - actual) < 4 * float(changes.std()) / 300**0.5
        assert float(changes.std()) > 0


@pytest.mark.parametrize("objective", ["distill", "task"])
def test_all_samples_are_taken_where_they_are_affordable(objective):
    m = _setup(objective=objective)
    assert affordable_samples(len(m.layers), SAMPLES) == SAMPLES
    sample, delta = draw_loss_sample(m, torch.rand(SAMPLES)), _delta(m)
    change = sample.change(m.model, m.layers[0], delta)
    before = m.objective.value(m.model)
    with torch.no_grad():
        m.model[0].weight.add_(delta)
        assert change == pytest.approx(m.objective.value(m.model) - before, rel=1e-9)
    assert sample.objective.batches == m.objective.batches


def test_the_cost_does_not_grow_with_the_depth():
    for layers in (5, 20, 50):
        assert 2.5 / 3 * layers * affordable_samples(layers, 128) / 128 <= 3
