from __future__ import annotations

from dataclasses import replace

import nets
import pytest
import torch

from lightning_caq import quantize
from lightning_caq.allocation.choose import Chooser
from lightning_caq.evaluation.explain_run import eigenpair_points, explain
from lightning_caq.network.batches import calibration_batches
from lightning_caq.network.layers import find_layers, layer_sizes
from lightning_caq.network.objective import make_objective
from lightning_caq.options import QuantizationOptions
from lightning_caq.selection.candidate import open_workshop
from lightning_caq.selection.select import Contest
from lightning_caq.utilities.progress import Progress


@pytest.fixture
def case():
    """A contest that is decided, its network float again; the plan and what it was judged by."""
    torch.manual_seed(3)
    net, raw = nets.small_cnn().eval(), [torch.randn(32, 1, 8, 8) for _ in range(2)]
    options = QuantizationOptions(method="cet", avg_bits=3, curvature_samples=32, eigenpairs=8, guard=False, compare=())
    profile = quantize(
        net, raw, avg_bits=3, curvature_samples=32, eigenpairs=8, guard=False, compare=(), inplace=False
    ).profile
    batches = calibration_batches(raw, options.calibration_samples, None)
    layers = find_layers(net, batches[0])
    sizes = layer_sizes(layers, 0)
    objective = make_objective("distill", net, batches)
    contest = Contest(
        Chooser(profile, sizes, options.bits, 1.0, lambda bits: 0.0, 0),
        open_workshop(net, layers, sizes, options, batches),
        lambda: {"distill": objective.value(net)},
        options,
        Progress(),
        {},
    )
    plan = contest.hold().plan
    return net, contest, plan, batches


def test_the_number_that_was_used_gives_the_plans_network(case) -> None:
    net, contest, plan, batches = case
    before = {name: x.clone() for name, x in net.state_dict().items()}
    points = eigenpair_points(contest, plan.avg_bits, batches, counts=(1, 2, 4))
    assert [p.eigenpairs for p in points] == [1, 2, 4, 8]
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    used = points[-1]
    assert (used.avg_bits, used.ratio) == (plan.avg_bits, plan.ratio)
    assert used.metrics["distill"] == pytest.approx(contest.metrics["quantized"]["distill"], rel=1e-6)
    assert all(p.avg_bits <= plan.avg_bits for p in points)


def test_equal_bits_are_rounded_once(case, monkeypatch) -> None:
    _, contest, plan, batches = case
    tried = []
    attempt = type(contest.workshop).attempt

    def counted(self, method, budget, bits):
        tried.append(bits)
        return attempt(self, method, budget, bits)

    monkeypatch.setattr(type(contest.workshop), "attempt", counted)
    points = eigenpair_points(contest, plan.avg_bits, batches, counts=(5, 6, 7))
    assert len(points) == 4
    assert len(tried) == len(set(tried)) < 4


def test_a_profile_without_a_subspace_has_nothing_to_vary(case) -> None:
    _, contest, plan, batches = case
    contest.chooser = replace(contest.chooser, profile=replace(contest.chooser.profile, needs=("kappa",)))
    assert eigenpair_points(contest, plan.avg_bits, batches) == ()


def test_everything_is_explained(case) -> None:
    _, contest, plan, batches = case
    found = explain(contest, plan, batches)
    names = list(plan.bits)
    assert list(found.alone) == list(found.energies) == names
    assert sorted(found.tightness) == sorted(contest.options.bits)
    assert found.landscape is not None
    assert {p.eigenpairs for p in found.eigenpairs} >= {5, 8}
