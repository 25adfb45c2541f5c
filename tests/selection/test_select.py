"""What a run makes, and which network it keeps."""

import copy
from types import SimpleNamespace

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.allocation import methods
from lightning_caq.allocation.choose import Choice, Chooser
from lightning_caq.allocation.methods import register_method
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.options import QuantizationOptions
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.selection.candidate import Attempt
from lightning_caq.selection.select import Contest
from lightning_caq.sizes import LayerSizes
from lightning_caq.utilities.progress import Progress

FAST = {"calibration_samples": 64, "curvature_samples": 24, "bits": (2, 3, 4, 8)}


class Worst:
    """Bits where they do the least good: to small errors rather than to large ones."""

    needs = frozenset({"subspace"})

    def costs(self, profile, bits):
        return [[-row.second_order[b] for b in bits] for row in profile.layers]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """For these tests alone: others look at every method that there is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_registered", dict(methods._registered))
        register_method("worst", Worst())
        yield


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=60).eval()


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained)


def _batches():
    return [nets.images(64, 1)[0]]


def _accuracy(model):
    x, y = nets.images(200, 5)
    with torch.no_grad():
        return {"acc": float((model(x).argmax(1) == y).float().mean())}


def test_uniform_bits_win_where_they_are_better_and_a_warning_says_so(net):
    with pytest.warns(UserWarning, match=r"uniform bits are better than those of worst .* guard=False"):
        result = quantize(net, _batches(), method="worst", avg_bits=4, compare=(), **FAST)
    assert result.plan.method == result.report.method == "uniform"
    assert set(result.report.sizes) == {"float", "quantized", "worst"}
    assert any("Uniform bits are better" in note for note in result.report.notes)
    assert result.report.metrics["quantized/distill"] < result.report.metrics["worst/distill"]


def test_without_the_guard_the_methods_own_bits_are_kept(net):
    result = quantize(net, _batches(), method="worst", avg_bits=4, compare=(), guard=False, **FAST)
    assert result.plan.method == "worst"
    assert set(result.report.sizes) == {"float", "quantized"}


@every(("held_out", "kept"), [(0.1, "cet"), (0.3, "uniform")])
@every("compare", [(), ("uniform",)])
@pytest.mark.filterwarnings("ignore:caq. uniform bits are better")
def test_the_guard_decides_by_the_samples_held_out(held_out, kept, compare):
    losses, made = {"cet": held_out, "uniform": 0.2}, []

    def attempt(method, budget, choice):
        made.append(method)
        widths, sizes = dict(enumerate(choice.bits)), LayerSizes((1, 1), (1, 1), activation_bits=choice.inputs)
        return Attempt(SimpleNamespace(method=method, widths=widths, sizes=sizes, avg_bits=3.0), losses[method])

    contest = Contest(
        chooser=SimpleNamespace(choose=lambda method, budget: Choice((2, 4) if method == "cet" else (3, 3))),
        workshop=SimpleNamespace(attempt=attempt, restore=lambda: None, shortage=""),
        judge=lambda: {"distill": losses[made[-1]]},
        options=QuantizationOptions(avg_bits=3, compare=compare),
        progress=Progress(),
        float_metrics={},
    )
    assert contest.hold().plan.method == kept
    expected = {"quantized"} | set(compare) | ({"cet"} if kept == "uniform" else set())
    assert set(contest.attempts) == set(contest.metrics) == expected
    assert contest.metrics["quantized"]["distill"] == losses[kept] == min(losses.values())
    assert made == ["cet", "uniform"]


@every(("accuracy", "kept"), [(0.5, "cet"), (0.9, "uniform")])
@pytest.mark.filterwarnings("ignore:caq. uniform bits are better")
def test_the_guard_loses_no_more_of_the_metric_than_max_drop_allows(accuracy, kept):
    losses, accuracies, made = {"cet": 0.3, "uniform": 0.2}, {"cet": 0.9, "uniform": accuracy}, []

    def attempt(method, budget, choice):
        made.append(method)
        widths, sizes = dict(enumerate(choice.bits)), LayerSizes((1, 1), (1, 1))
        return Attempt(SimpleNamespace(method=method, widths=widths, sizes=sizes, avg_bits=3.0), losses[method])

    contest = Contest(
        chooser=SimpleNamespace(choose=lambda method, budget: Choice((2, 4) if method == "cet" else (3, 3))),
        workshop=SimpleNamespace(attempt=attempt, restore=lambda: None, shortage=""),
        judge=lambda: {"distill": losses[made[-1]], "acc": accuracies[made[-1]]},
        options=QuantizationOptions(max_drop=0.02, monitor="acc", compare=()),
        progress=Progress(),
        float_metrics={"acc": 0.91},
    )
    assert contest.hold().plan.method == kept
    assert contest.metrics["quantized"]["acc"] == 0.9


@every(("error", "kept"), [(2.0, "caq"), (3.0, "uniform")])
@pytest.mark.filterwarnings("ignore:caq. uniform bits are better")
def test_the_guard_keeps_the_predicted_error(error, kept):
    losses, made = {"caq": 0.3, "uniform": 0.2}, []
    rows = [LayerCurvature(n, 1, 1, 1, carried_error={2: 2 * e, 3: e, 4: 0.0}) for n, e in (("a", 1.0), ("b", 2.0))]

    def attempt(method, budget, choice):
        made.append(method)
        widths, sizes = dict(enumerate(choice.bits)), LayerSizes((1, 1), (1, 1))
        return Attempt(SimpleNamespace(method=method, widths=widths, sizes=sizes, avg_bits=3.0), losses[method])

    chooser = Chooser(CurvatureProfile(tuple(rows)), LayerSizes((1, 1), (1, 1)), (2, 3, 4), 1.0, lambda bits: 0.0, 0)
    chosen = {"caq": Choice((2, 4)), "uniform": Choice((3, 3))}  # errors of 2 and of √5
    contest = Contest(
        chooser=SimpleNamespace(choose=lambda method, budget: chosen[method], keeps=chooser.keeps),
        workshop=SimpleNamespace(attempt=attempt, restore=lambda: None, shortage=""),
        judge=lambda: {"distill": losses[made[-1]]},
        options=QuantizationOptions(method="caq", error=error, compare=()),
        progress=Progress(),
        float_metrics={},
    )
    assert contest.hold().plan.method == kept


def test_max_drop_finds_a_small_network_that_keeps_the_metric(net):
    reference = _accuracy(net)["acc"]
    result = quantize(
        net, _batches(), method="caq", max_drop=0.03, monitor="acc", evaluate=_accuracy, compare=(), guard=False, **FAST
    )
    assert _accuracy(result.model.eval())["acc"] >= reference - 0.03
    assert result.plan.avg_bits < 6
    assert result.report.budget == "max_drop=0.03 (acc)"


def test_each_step_of_the_search_is_an_evaluation_and_there_are_no_more_than_allowed(net):
    calls = []

    def evaluate(model):
        calls.append(model)
        return _accuracy(model)

    options = {"max_drop": 1.0, "monitor": "acc", "max_evaluations": 3, "compare": (), **FAST}
    quantize(net, _batches(), method="uniform", evaluate=evaluate, **options)
    assert len(calls) <= 1 + 3  # the float network, and three more


def test_a_small_metric_may_be_the_good_one(net):
    def evaluate(model):
        return {"loss": 1 - _accuracy(model)["acc"]}

    result = quantize(
        net, _batches(), method="uniform", max_drop=0.02, monitor="loss", monitor_mode="min", evaluate=evaluate,
        compare=(), **FAST,
    )  # fmt: skip
    metrics = result.report.metrics
    assert metrics["quantized/loss"] <= metrics["float/loss"] + 0.02


def test_a_drop_that_nothing_meets_is_refused_and_the_float_network_left(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scores = iter([1.0] + [0.0] * 20)
    with pytest.raises(BudgetError, match=r"max_drop=0.1 .acc. cannot be met: even with every layer at 8 bits"):
        quantize(
            net, _batches(), method="uniform", max_drop=0.1, monitor="acc", evaluate=lambda m: {"acc": next(scores)},
            compare=(), **FAST,
        )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not quantized_modules(net)


def test_a_metric_that_nobody_computes_is_refused_before_measuring(net):
    said = []
    with pytest.raises(BudgetError, match=r"monitor=.auc. is not among the metrics .* 'distill', 'acc'"):
        quantize(net, _batches(), max_drop=0.1, monitor="auc", evaluate=_accuracy, say=said.append, **FAST)
    assert not any("measuring" in line for line in said)


def test_an_error_budget_is_kept_as_predicted_and_others_get_the_same_size(net):
    found = {}
    for error in (0.05, 0.5):
        result = quantize(
            copy.deepcopy(net), _batches(), method="caq", error=error, compare=("uniform",), guard=False, **FAST
        )
        bits = result.plan.bits
        squares = sum(row.carried_error[bits[row.name]] ** 2 for row in result.profile.layers)
        with torch.no_grad():
            norm = float(net(_batches()[0][:24]).square().sum(1).mean().sqrt())
        assert squares**0.5 <= error * norm * (1 + 1e-9)
        assert result.report.sizes["uniform"].avg_bits <= result.plan.avg_bits
        found[error] = result.plan.avg_bits
    assert found[0.5] < found[0.05]


def test_an_error_budget_needs_a_method_that_composes_errors(net):
    with pytest.raises(BudgetError, match=r"error=0.1 needs a method that composes errors, such as 'caq'; got 'cet'"):
        quantize(net, _batches(), method="cet", error=0.1, **FAST)


def test_bit_operations_are_a_hard_limit(net):
    result = quantize(net, _batches(), method="caq", bops=0.002, compare=(), guard=False, **FAST)
    operations = sum(x.macs * 32 * result.plan.bits[x.name] for x in result.report.layers) / 1e9
    assert operations <= 0.002


def test_bit_operations_and_size_are_hard_limits_together(net):
    result = quantize(net, _batches(), method="caq", bops=0.002, avg_bits=3, compare=(), guard=False, **FAST)
    assert sum(x.macs * 32 * result.plan.bits[x.name] for x in result.report.layers) / 1e9 <= 0.002
    assert result.plan.avg_bits <= 3


def test_search_methods_run_on_the_network_and_leave_it_float_between(net):
    result = quantize(net, _batches(), method="random_search", avg_bits=3, compare=(), guard=False, **FAST)
    assert result.plan.avg_bits <= 3
    assert isinstance(result.model, nn.Module)


@every(
    ("options", "words"),
    [
        ({"max_drop": 0.1}, "max_drop is given without monitor"),
        ({"avg_bits": 3, "max_evaluations": 0}, "max_evaluations=0"),
        ({"avg_bits": 3, "monitor_mode": "up"}, "monitor_mode='up' is not known"),
        ({"avg_bits": 3, "error": 0.1}, "two budgets"),
    ],
)
def test_bad_budgets_are_refused(net, options, words):
    with pytest.raises(OptionError, match=words):
        quantize(net, _batches(), **options, **FAST)
