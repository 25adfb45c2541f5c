"""The objective against formulas in float64."""

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.batches import take_samples
from lightning_caq.network.objective import make_objective


@every("name", nets.CASES)
def test_distill_is_the_mean_divergence_over_samples(name):
    case = nets.make_case(name)
    objective = make_objective("distill", case.net, case.batches)
    loss = nets.distill_loss(case)
    assert objective.value(case.net) == pytest.approx(0, abs=1e-15)
    with torch.no_grad():
        for parameter in case.net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = float(loss(case.net))
    assert expected > 1e-4
    assert objective.value(case.net) == pytest.approx(expected, rel=1e-9)


def test_uneven_batches_count_by_their_samples():
    net, x, y = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(0, 3, (10,))
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    objective = make_objective("task", net, batches, loss)
    assert objective.samples == 10
    assert [objective.weight(i) for i in range(2)] == [0.7, 0.3]
    assert objective.value(net) == pytest.approx(float(loss(net, (x, y)).detach()), rel=1e-6)


def test_no_reference_outputs_means_no_graph():
    net = nn.Linear(3, 2)
    (target,) = make_objective("distill", net, [torch.randn(4, 3)]).targets
    assert not target.values.requires_grad


def test_bad_input():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(OptionError, match="objective='task' needs loss_fn"):
        make_objective("task", net, [x])
    with pytest.raises(CalibrationError, match="outputs for calibration batch 1 hold NaN"):
        make_objective("distill", net, [x, x / 0])
    for bad, message in (
        (lambda m, b: m(b).sum() * float("nan"), "batch 0 is nan; only finite losses"),
        (lambda m, b: m(b).sum() / 0, "batch 0 is -?inf"),
        (lambda m, b: m(b), r"must be a scalar tensor, got a tensor of shape \[4, 2\]"),
        (lambda m, b: 3.0, "must be a scalar tensor, got float"),
        (lambda m, b: None, "must be a scalar tensor, got NoneType"),
    ):
        with pytest.raises(CalibrationError, match=message):
            make_objective("task", net, [x], bad).value(net)


def test_on_some_of_the_samples_it_is_the_objective_made_for_them():
    net, batches = nn.Linear(4, 3), [torch.randn(6, 4), torch.randn(6, 4)]
    some = take_samples(batches, 8)
    taken, made = make_objective("distill", net, batches).on(net, some), make_objective("distill", net, some)
    assert all(torch.equal(a.values, b.values) for a, b in zip(taken.targets, made.targets, strict=True))
    assert taken.samples == 8
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    taken, made = (make_objective("task", net, x, loss) for x in (batches, some))
    assert taken.on(net, some) == made
