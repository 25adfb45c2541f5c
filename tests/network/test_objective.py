"""The objective against formulas in float64."""

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.network.batches import take_samples
from lightning_caq.network.objective import divergence, make_objective, output_rows


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


def test_rows():
    logits = torch.arange(24.0)
    assert output_rows(logits.reshape(8, 3)).shape == (8, 3)
    assert torch.equal(output_rows(logits.reshape(2, 4, 3)), logits.reshape(8, 3))  # tokens
    pixels = output_rows(logits.reshape(2, 3, 2, 2))
    assert pixels.shape == (8, 3)
    assert pixels[0].tolist() == [0, 4, 8]  # the classes of the first pixel
    assert output_rows(logits).shape == (24, 1)


def test_divergence():
    p, q = torch.randn(5, 4), torch.randn(5, 4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    ).mean()
    assert float(divergence(p, q)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(p[:, :1], q[:, :1])) == pytest.approx(float(F.mse_loss(p[:, :1], q[:, :1])) / 2)
    assert float(divergence(p.half(), p.half() + 0.01 * q.half())) > 1e-6  # not lost in half precision


def test_divergence_keeps_double_precision():
    p = torch.randn(5, 4, dtype=torch.float64)
    q = p + 1e-7 * torch.randn_like(p)
    centred = (q - p) - (p.softmax(1) * (q - p)).sum(1, keepdim=True)
    expected = 0.5 * (p.softmax(1) * centred.square()).sum(1).mean()  # second order; the third is 1e-7 of it
    assert float(divergence(p, q)) == pytest.approx(float(expected), rel=0.05)


def test_no_reference_outputs_means_no_graph():
    net = nn.Linear(3, 2)
    (target,) = make_objective("distill", net, [torch.randn(4, 3)]).targets
    assert not target.requires_grad


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
    assert all(torch.equal(a, b) for a, b in zip(taken.targets, made.targets, strict=True))
    assert taken.samples == 8
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    taken, made = (make_objective("task", net, x, loss) for x in (batches, some))
    assert taken.on(net, some) == made
