"""What a run makes, and which network it keeps."""

import copy
import re
from contextlib import contextmanager
from types import SimpleNamespace

import nets
import numpy as np
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
from lightning_caq.scores import Score
from lightning_caq.selection.candidate import Candidate
from lightning_caq.selection.select import Selector
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
    with pytest.warns(UserWarning, match=r"Uniform bits are better than those of worst .* guard=False"):
        result = quantize(net, _batches(), method="worst", avg_bits=4, compare=(), **FAST)
    assert result.plan.method == result.report.method == "uniform"
    assert set(result.report.sizes) == {"float", "quantized", "worst"}
    assert any("Uniform bits are better" in note for note in result.report.notes)
    assert result.report.metrics["quantized/distill"] < result.report.metrics["worst/distill"]


def test_without_the_guard_the_methods_own_bits_are_kept(net):
    result = quantize(net, _batches(), method="worst", avg_bits=4, compare=(), guard=False, **FAST)
    assert result.plan.method == "worst"
    assert set(result.report.sizes) == {"float", "quantized"}


class MadeUp:
    """Candidates that no network stands behind: a method's choice, error and metrics are given."""

    def __init__(self, **methods):
        self.methods, self.made, self.shortage = methods, [], ""

    def choose(self, method, budget):
        return Choice(self.methods[method]["bits"])

    @contextmanager
    def made_by(self, method, budget, choice):
        self.made.append(method)
        yield Candidate(SimpleNamespace(method=method, avg_bits=3.0), choice, self.methods[method]["error"])

    def judge(self):
        method = self.methods[self.made[-1]]
        return {"distill": Score(method["error"]), "acc": Score(method.get("acc") or 0.0)}

    def select(self, keeps=None, **options):
        return Selector(
            chooser=SimpleNamespace(choose=self.choose, keeps=keeps),
            maker=SimpleNamespace(made=self.made_by, shortage=""),
            judge=self.judge,
            options=QuantizationOptions(**options),
            progress=Progress(),
            float_metrics={"acc": Score(0.91)},
        ).select()


@every(("error", "kept"), [(0.1, "cet"), (0.3, "uniform")])
@every("compare", [(), ("uniform",)])
@pytest.mark.filterwarnings("ignore:caq. Uniform bits are better")
def test_the_guard_decides_by_the_samples_held_out(error, kept, compare):
    networks = MadeUp(cet={"bits": (2, 4), "error": error}, uniform={"bits": (3, 3), "error": 0.2})
    selection = networks.select(avg_bits=3, compare=compare)
    assert selection.chosen.plan.method == kept
    assert set(selection.candidates) == {"quantized"} | set(compare) | ({"cet"} if kept == "uniform" else set())
    assert selection.chosen.metrics["distill"] == min(error, 0.2)
    assert networks.made == ["cet", "uniform"]


def test_the_same_bits_are_not_made_twice_for_the_guard():
    networks = MadeUp(cet={"bits": (3, 3), "error": 0.3}, uniform={"bits": (3, 3), "error": 0.2})
    selection = networks.select(avg_bits=3, compare=())
    assert networks.made == ["cet"]
    assert selection.chosen.choice == Choice((3, 3))


@every(("accuracy", "kept"), [(0.5, "cet"), (0.9, "uniform")])
@pytest.mark.filterwarnings("ignore:caq. Uniform bits are better")
def test_the_guard_loses_no_more_of_the_metric_than_max_drop_allows(accuracy, kept):
    cet = {"bits": (2, 4), "error": 0.3, "acc": 0.9}
    networks = MadeUp(cet=cet, uniform={"bits": (3, 3), "error": 0.2, "acc": accuracy})
    chosen = networks.select(max_drop=0.02, monitor="acc", monitor_mode="max", compare=()).chosen
    assert (chosen.plan.method, chosen.metrics["acc"]) == (kept, 0.9)


@every(("error", "kept"), [(2.0, "caq"), (3.0, "uniform")])
@pytest.mark.filterwarnings("ignore:caq. Uniform bits are better")
def test_the_guard_keeps_the_predicted_error(error, kept):
    rows = [LayerCurvature(n, 1, 1, 1, carried_error={2: 2 * e, 3: e, 4: 0.0}) for n, e in (("a", 1.0), ("b", 2.0))]
    chooser = Chooser(CurvatureProfile(tuple(rows)), LayerSizes((1, 1), (1, 1)), (2, 3, 4), 1.0, lambda bits: 0.0, 0)
    # The predicted errors are 2 and √5.
    networks = MadeUp(caq={"bits": (2, 4), "error": 0.3}, uniform={"bits": (3, 3), "error": 0.2})
    selection = networks.select(chooser.keeps, method="caq", error=error, compare=())
    assert selection.chosen.plan.method == kept


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
        net, _batches(), method="uniform", max_drop=0.02, monitor="loss", evaluate=evaluate,  # by its name
        compare=(), **FAST,
    )  # fmt: skip
    metrics = result.report.metrics
    assert metrics["quantized/loss"] <= metrics["float/loss"] + 0.02


def test_a_metric_of_which_nobody_knows_the_better_way_is_refused_before_measuring(net):
    said, options = [], {"max_drop": 0.1, "monitor": "energy", **FAST}
    with pytest.raises(OptionError, match="large or a small 'energy'; give monitor_mode='max' or 'min'"):
        quantize(net, _batches(), evaluate=lambda model: {"energy": 1.0}, say=said.append, **options)
    assert not any("measuring" in line for line in said)


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


class Noisy:
    """A search over bits b from 2 to 8 of which single samples are right or wrong: more of them wrong at fewer bits."""

    def __init__(self, samples, wrong):
        rng = np.random.default_rng(0)
        self.hard, self.wrong, self.bits, self.said = rng.random(samples), wrong, 8.0, []

    def score(self, bits):
        return Score.of_samples(self.hard > self.wrong(bits))

    @contextmanager
    def made(self, method, budget, choice):
        self.bits = choice.bits[0]
        yield Candidate(SimpleNamespace(method=method, avg_bits=self.bits), choice, 0.1)

    def select(self, **options):
        return Selector(
            chooser=SimpleNamespace(choose=lambda method, budget: Choice((budget.value,))),
            maker=SimpleNamespace(made=self.made, shortage=""),
            judge=lambda: {"acc": self.score(self.bits)},
            options=QuantizationOptions(monitor="acc", compare=(), guard=False, **options),
            progress=Progress(self.said.append),
            float_metrics={"acc": self.score(32.0)},
        ).select()


def test_max_drop_is_kept_with_two_standard_errors():
    networks = Noisy(2000, lambda bits: 0.02 + 0.05 * 4.0 ** (2 - bits))
    selection = networks.select(max_drop=0.01)
    chosen = selection.chosen
    drop = networks.score(32.0).less(chosen.metrics["acc"])
    assert drop.value + 2 * drop.stderr <= 0.01
    smaller = networks.score(32.0).less(networks.score(chosen.plan.avg_bits - 0.5))
    assert smaller.value + 2 * smaller.stderr > 0.01
    (note,) = selection.notes
    assert note.severity == "information"
    assert "on 2,000 samples, of which 0.01 are 20" in note
    assert any(re.search(r"bits on average: acc 0\.\d+ \(−0\.\d+ ± 0\.\d+\)$", line) for line in networks.said)


@pytest.mark.filterwarnings("ignore:caq. max_drop")
def test_too_few_samples_are_said_with_how_many_it_takes():
    networks = Noisy(60, lambda bits: 0.02 * (bits < 20))
    networks.hard = (np.arange(60) + 0.5) / 60  # one of 60 becomes wrong: 0.017 ± 0.017
    (note,) = networks.select(max_drop=0.02).notes
    assert note.severity == "warning"
    assert "no network is certain to be within the budget" in note
    needed = int(re.search(r"takes about ([\d,]+) samples", note)[1].replace(",", ""))
    assert needed == pytest.approx(60 * (2 / 60 / 0.02) ** 2, abs=1)


def test_where_only_a_value_is_known_that_is_said(net):
    result = quantize(
        net, _batches(), method="uniform", max_drop=0.1, monitor="acc", evaluate=_accuracy, compare=(), **FAST
    )
    assert any("one value for each sample" in note for note in result.report.notes)
