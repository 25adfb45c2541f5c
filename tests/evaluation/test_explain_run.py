from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import nets
import pytest
import torch

from lightning_caq import quantize
from lightning_caq.allocation.choose import Chooser
from lightning_caq.evaluation.explain_run import eigenpair_points, explain
from lightning_caq.network.batches import calibration_batches
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers, layer_sizes
from lightning_caq.network.objective import objective_from
from lightning_caq.options import QuantizationOptions
from lightning_caq.selection.candidate import prepare_candidates
from lightning_caq.selection.select import Selector
from lightning_caq.utilities.progress import Progress


@pytest.fixture
def case():
    """A run whose network is selected and float again: its tools, its objective and the candidate to keep."""
    torch.manual_seed(3)
    net, raw = nets.small_cnn().eval(), [torch.randn(32, 1, 8, 8) for _ in range(2)]
    options = QuantizationOptions(method="cet", avg_bits=3, curvature_samples=32, eigenpairs=8, guard=False, compare=())
    profile = quantize(
        net, raw, avg_bits=3, curvature_samples=32, eigenpairs=8, guard=False, compare=(), inplace=False
    ).profile
    reference = make_reference(net, calibration_batches(raw, options.calibration_samples, None))
    layers = find_layers(net, reference.batches[0])
    sizes = layer_sizes(layers, 0)
    objective = objective_from("distill", reference)
    chooser = Chooser(profile, sizes, options.bits, 1.0, lambda bits: 0.0, 0)
    maker = prepare_candidates(net, layers, sizes, options, reference)
    selector = Selector(chooser, maker, lambda: {"distill": objective.value(net)}, options, Progress(), {})
    return SimpleNamespace(
        net=net, reference=reference, objective=objective, chooser=chooser, maker=maker, chosen=selector.select().chosen
    )


def _points(case, counts, chooser=None):
    avg_bits = case.chosen.plan.avg_bits
    return eigenpair_points(case.maker, chooser or case.chooser, case.objective, avg_bits, counts=counts)


def test_the_number_that_was_used_gives_the_plans_network(case) -> None:
    before, plan = {name: x.clone() for name, x in case.net.state_dict().items()}, case.chosen.plan
    points = _points(case, (1, 2, 4))
    assert [p.eigenpairs for p in points] == [1, 2, 4, 8]
    assert all(torch.equal(x, before[name]) for name, x in case.net.state_dict().items())
    used = points[-1]
    assert (used.avg_bits, used.ratio) == (plan.avg_bits, plan.ratio)
    assert used.metrics["distill"] == pytest.approx(case.chosen.metrics["distill"], rel=1e-6)
    assert all(p.avg_bits <= plan.avg_bits for p in points)


def test_equal_bits_are_rounded_once(case, monkeypatch) -> None:
    tried = []
    made = type(case.maker).made

    def counted(self, method, budget, choice):
        tried.append(choice)
        return made(self, method, budget, choice)

    monkeypatch.setattr(type(case.maker), "made", counted)
    assert len(_points(case, (5, 6, 7))) == 4
    assert len(tried) == len(set(tried)) < 4


def test_a_profile_without_a_subspace_has_nothing_to_vary(case) -> None:
    chooser = replace(case.chooser, profile=replace(case.chooser.profile, needs=("kappa",)))
    assert _points(case, (1, 2), chooser) == ()


def test_everything_is_explained(case) -> None:
    studies = explain(
        case.maker, case.chooser, objective=case.objective, reference=case.reference, plan=case.chosen.plan
    )
    names = list(case.chosen.plan.bits)
    assert list(studies.alone) == list(studies.energies) == names
    assert sorted(studies.tightness) == sorted(case.chooser.bits)
    assert studies.landscape is not None
    assert {p.eigenpairs for p in studies.eigenpairs} >= {5, 8}
