"""``quantize`` from end to end, on small networks that were trained on data that can be learnt."""

import copy
import json
import random

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq import CurvatureProfile, QuantizationReport, quantize
from lightning_caq.errors import BudgetError, CalibrationError, CAQError, LayerError, OptionError
from lightning_caq.layers import find_layers
from lightning_caq.quantizers.modules import on_grid
from lightning_caq.quantizers.swap import quantized_modules, restore_modules

CALIBRATION = nets.images(96, 1)
TEST = nets.images(400, 2)
FAST = {"curvature_samples": 48, "eigenpairs": 8}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = nets.trained(nets.small_cnn(), *nets.images(512, 0), steps=250)
    assert nets.accuracy(copy.deepcopy(net).eval(), *TEST) > 0.95
    return net


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained)


def _batches():
    x, y = CALIBRATION
    return [(x[:40], y[:40]), (x[40:], y[40:])]


def _loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def _evaluate(net):
    return {"acc": nets.accuracy(net, *TEST)}


def _picture(net):
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "ids": [id(p) for p in net.parameters()],
        "classes": [type(m) for m in net.modules()],
        "flags": [m.training for m in net.modules()],
        "grads": [p.requires_grad for p in net.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "attributes": [sorted(m.__dict__) for m in net.modules()],
        "rng": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
    }


def _same(before, after):
    assert before["state"].keys() == after["state"].keys()
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]
    for key in before.keys() - {"state", "rng"}:
        assert before[key] == after[key], key


def _check(result, sizes):
    """What must hold of every result, counted by hand from the weights that are there."""
    plan, modules = result.plan, quantized_modules(result.model)
    assert list(plan.bits) == list(modules)
    payload = channels = 0
    for name, module in modules.items():
        weight = module.weight.detach().flatten(1)
        assert max(len(row.unique()) for row in weight) <= 2 ** plan.bits[name]
        payload += weight.numel() * plan.bits[name]
        channels += len(weight)
    count = sum(sizes.values())
    quantized = sum(sizes[name] for name in plan.bits)
    assert plan.avg_bits == pytest.approx(payload / quantized)
    assert plan.ratio == pytest.approx(32 * count / (payload + 48 * channels + 32 * (count - quantized)))
    report = result.report
    everything = payload + 48 * channels + 32 * (count - quantized)
    assert report.sizes["quantized"].bytes == plan.bytes == -(-everything // 8)
    assert report.sizes["float"].bytes == 4 * count


SIZES = {"0": 72, "4": 576, "10": 128}


@pytest.mark.parametrize("method", ["cet", "caq", "uniform"])
@pytest.mark.parametrize("objective", ["distill", "task"])
def test_every_method_keeps_accuracy_at_four_bits(net, method, objective):
    result = quantize(
        net, _batches(), avg_bits=4, method=method, objective=objective, loss_fn=_loss, evaluate=_evaluate,
        compare=(), **FAST,
    )  # fmt: skip
    _check(result, SIZES)
    assert result.model is net
    assert result.plan.avg_bits <= 4
    metrics = result.report.metrics
    assert set(metrics) == {f"{v}/{m}" for v in ("float", "quantized") for m in ("acc", objective)}
    assert metrics["float/acc"] > 0.95
    assert metrics["quantized/acc"] > metrics["float/acc"] - 0.03
    assert nets.accuracy(net.eval(), *TEST) == pytest.approx(metrics["quantized/acc"])


@pytest.mark.parametrize("rounding", ["error_feedback", "nearest"])
@pytest.mark.parametrize("batchnorm", ["recentre", "keep"])
def test_roundings_and_repairs(net, rounding, batchnorm):
    kept = copy.deepcopy(net.state_dict())
    result = quantize(
        net, _batches(), avg_bits=2.5, method="uniform", rounding=rounding, batchnorm=batchnorm, compare=()
    )
    _check(result, SIZES)
    state = net.state_dict()
    changed = {k for k, v in state.items() if not torch.equal(v, kept[k])}
    assert changed == {"0.weight", "4.weight", "10.weight"} | result.plan.repairs.keys()
    assert (batchnorm == "keep") <= (result.plan.repairs == {})
    for name, module in quantized_modules(net).items():
        nearest = torch.equal(module.weight, module.grid.nearest(kept[f"{name}.weight"]))
        assert nearest == (rounding == "nearest")
    assert torch.equal(state["1.num_batches_tracked"], kept["1.num_batches_tracked"])


def test_feedback_and_repair_bring_the_outputs_nearer_to_the_float_ones(net):
    found = {}
    for rounding, batchnorm in (("nearest", "keep"), ("nearest", "recentre"), ("error_feedback", "recentre")):
        result = quantize(
            net, _batches(), avg_bits=2, method="uniform", rounding=rounding, batchnorm=batchnorm, compare=(),
            inplace=False,
        )  # fmt: skip
        with torch.no_grad():
            outputs = copy.deepcopy(net).eval()(TEST[0])
            found[rounding, batchnorm] = float(nets.kl(outputs, result.model.eval()(TEST[0])))
    assert found["error_feedback", "recentre"] < found["nearest", "recentre"] < found["nearest", "keep"]


@pytest.mark.parametrize("seed", range(8))
def test_budgets_are_hard(net, seed):
    rng = np.random.default_rng(seed)
    kwargs = {"method": ("caq", "cet")[seed % 2], "rounding": "nearest", "batchnorm": "keep", "compare": ("uniform",)}
    avg_bits, ratio = rng.uniform(2, 8), rng.uniform(3.0, 8.0)
    result = quantize(net, _batches(), avg_bits=avg_bits, inplace=False, **kwargs, **FAST)
    _check(result, SIZES)
    assert all(size.avg_bits <= avg_bits for name, size in result.report.sizes.items() if name != "float")
    result = quantize(net, _batches(), ratio=ratio, **kwargs, **FAST)
    _check(result, SIZES)
    assert all(size.ratio >= ratio for name, size in result.report.sizes.items() if name != "float")


def test_curvature_puts_bits_where_they_count(trained):
    """A last layer that is ignored but for one class-blind sum gets the fewest bits from both methods."""
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net[10].weight.copy_(net[10].weight.mean(0, keepdim=True) + 1e-3 * net[10].weight)
    for method in ("cet", "caq"):
        result = quantize(net, _batches(), avg_bits=4, method=method, compare=(), inplace=False, **FAST)
        assert result.plan.bits["10"] >= max(result.plan.bits["0"], result.plan.bits["4"])


def test_out_of_place_leaves_the_original_alone(net):
    before = _picture(net)
    result = quantize(net, _batches(), avg_bits=3, inplace=False, compare=(), **FAST)
    _same(before, _picture(net))
    assert result.model is not net
    assert quantized_modules(result.model)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in result.model.parameters()}


def test_in_place_leaves_everything_else_alone(net):
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = None
    before = _picture(net)
    result = quantize(net, _batches(), avg_bits=3, compare=(), **FAST)
    after = _picture(net)
    for key in ("ids", "flags", "grads", "hooks"):
        assert before[key] == after[key]
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]
    changed = {k for k, v in after["state"].items() if not torch.equal(v, before["state"][k])}
    assert changed == {"0.weight", "4.weight", "10.weight"} | result.plan.repairs.keys()
    assert all(p.grad is None for p in net.parameters())


def test_is_the_same_every_time(net):
    kwargs = {"avg_bits": 3, "evaluate": _evaluate, "objective": "task", "loss_fn": _loss, "inplace": False, **FAST}
    first = quantize(net, _batches(), **kwargs)
    torch.manual_seed(99)
    np.random.seed(99)
    again = quantize(net, _batches(), **kwargs)
    assert first.plan.bits == again.plan.bits
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first.plan.layers, again.plan.layers, strict=True))
    assert first.profile.layers == again.profile.layers
    assert first.report.metrics == again.report.metrics
    other = quantize(net, _batches(), **kwargs, seed=1)
    assert [r.trace for r in first.profile.layers] != [r.trace for r in other.profile.layers]


def test_evaluate_sees_each_network_once(net):
    seen = []

    def evaluate(model):
        assert model is net
        assert not model.training
        seen.append(copy.deepcopy(model.state_dict()))
        return {"n": len(seen)}

    before = copy.deepcopy(net.state_dict())
    result = quantize(net, _batches(), avg_bits=3, evaluate=evaluate, compare=("uniform", "caq"), **FAST)
    assert [result.report.metrics[f"{v}/n"] for v in ("float", "quantized", "uniform", "caq")] == [1, 2, 3, 4]
    assert all(torch.equal(v, before[k]) for k, v in seen[0].items())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in seen[1].items())
    for state in seen[2:]:
        assert max(len(row.unique()) for row in state["0.weight"].flatten(1)) <= 2**8
        assert not torch.equal(state["0.weight"], before["0.weight"])


def test_compared_methods_are_what_they_are_alone(net):
    both = quantize(net, _batches(), avg_bits=2.5, method="cet", evaluate=_evaluate, inplace=False, **FAST)
    alone = quantize(net, _batches(), avg_bits=2.5, method="uniform", evaluate=_evaluate, compare=(), **FAST)
    for metric in ("acc", "distill"):
        assert both.report.metrics[f"uniform/{metric}"] == alone.report.metrics[f"quantized/{metric}"]
    assert both.report.sizes["uniform"] == alone.report.sizes["quantized"]


def test_the_objective_that_is_reported_is_right(net):
    result = quantize(net, _batches(), avg_bits=2.5, compare=(), inplace=False, **FAST)
    with torch.no_grad():
        expected = nets.kl(copy.deepcopy(net).eval()(CALIBRATION[0]), result.model.eval()(CALIBRATION[0]))
    assert result.report.metrics["float/distill"] == pytest.approx(0, abs=1e-7)
    assert result.report.metrics["quantized/distill"] == pytest.approx(float(expected), rel=1e-4)


def test_report_and_profile(net):
    result = quantize(net, _batches(), avg_bits=3, evaluate=_evaluate, seed=7, **FAST)
    report = result.report
    assert [(r.name, r.kind, r.weights, r.macs) for r in report.layers] == [
        ("0", "conv2d", 72, 72 * 64),
        ("4", "conv2d", 576, 576 * 16),
        ("10", "linear", 128, 128),
    ]
    assert all(row.kappa > 0 and row.lipschitz > 0 for row in report.layers)
    assert [row.bits["quantized"] for row in report.layers] == list(result.plan.bits.values())
    assert (report.method, report.budget, report.options["seed"]) == ("cet", "avg_bits=3", 7)
    assert report.variants == ("float", "quantized", "uniform")
    assert set(report.predicted_loss) == {"quantized", "uniform"}
    assert report.predicted_loss["quantized"] <= report.predicted_loss["uniform"] * 1.000001
    assert QuantizationReport.from_json(report.to_json()).to_json() == report.to_json()
    assert CurvatureProfile.from_json(result.profile.to_json()) == result.profile
    assert result.profile.samples == 48
    assert json.loads(report.to_json())["versions"]["torch"]
    assert any("rounding" in step for step in report.seconds)


def test_progress_is_told(net):
    lines = []
    quantize(net, _batches(), avg_bits=3, compare=(), say=lines.append, **FAST)
    assert all(line.startswith("caq: ") for line in lines)
    assert "3 layers, 776 weights, 96 samples, cet with avg_bits=3: about" in lines[0]
    assert len(lines) > 4


def test_excluded_layers_stay_float_and_count(net):
    weight = net[0].weight.detach().clone()
    result = quantize(net, _batches(), avg_bits=3, exclude=["0"], compare=(), **FAST)
    _check(result, SIZES)
    assert torch.equal(net[0].weight, weight)
    assert type(net[0]) is nn.Conv2d
    assert list(result.plan.bits) == ["4", "10"]


def test_calibration_samples_are_a_limit(net):
    class Counting:
        read = 0

        def __iter__(self):
            for x in CALIBRATION[0].split(16):
                self.read += 1
                yield x

    source = Counting()
    result = quantize(net, source, avg_bits=3, calibration_samples=40, curvature_samples=100, compare=(), eigenpairs=4)
    assert source.read == 3
    assert result.profile.samples == 40


def test_data_loaders_and_dicts(net):
    loader = DataLoader(TensorDataset(*CALIBRATION), batch_size=32, shuffle=True)
    state = torch.get_rng_state()
    result = quantize(net, loader, avg_bits=3, compare=(), **FAST)
    _check(result, SIZES)
    assert torch.equal(state, torch.get_rng_state())

    named, x = nets.Named(), torch.randn(40, 3)
    batches = [{"a": x, "b": x[:, :2], "label": torch.zeros(40)}]
    assert quantize(named, batches, avg_bits=3, **FAST).plan.bits.keys() == {"left", "right", "out"}


@pytest.mark.parametrize("method", ["cet", "caq"])
@pytest.mark.parametrize("name", ["tied", "twice", "pixels", "regression", "frozen_inplace"])
def test_other_networks(name, method):
    case = nets.make_case(name)
    net = case.net.float()
    batches = [b.float() if b.is_floating_point() else b for b in case.batches]
    before = [p.requires_grad for p in net.parameters()]
    result = quantize(net, batches, avg_bits=4, method=method, guard=False)
    assert result.plan.avg_bits <= 4
    assert all(on_grid(m.weight, m.grid) for m in quantized_modules(net).values())
    assert [p.requires_grad for p in net.parameters()] == before
    assert np.isfinite(list(result.report.metrics.values())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net, x = nets.mlp().to(dtype), torch.randn(40, 4).to(dtype)
    result = quantize(net, [x], avg_bits=4)
    assert result.plan.avg_bits <= 4
    assert net(x).dtype == dtype
    assert all(on_grid(m.weight, m.grid) for m in quantized_modules(net).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("objective", ["distill", "task"])
def test_where_gradients_are_off(net, mode, objective):
    kwargs = {"avg_bits": 3, "objective": objective, "loss_fn": _loss, "compare": (), **FAST}
    expected = quantize(net, _batches(), inplace=False, **kwargs)
    with mode():
        found = quantize(net, [(x.clone(), y.clone()) for x, y in _batches()], **kwargs)
    assert found.plan.bits == expected.plan.bits
    assert _loss(net, _batches()[0]).requires_grad  # it can still be trained


def test_a_layer_that_no_batch_calls_stays_float():
    net = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})
    net.forward = lambda x: net["used"](x)
    idle = net["idle"].weight.detach().clone()
    result = quantize(net, [torch.randn(30, 6)], avg_bits=3)
    assert "Layer 'idle' stays in float32: no calibration batch calls it." in result.report.notes
    assert set(result.plan.bits) == {"used"}
    assert torch.equal(net["idle"].weight, idle)
    assert result.plan.sizes.unquantized == 36  # it counts in the ratio
    restore_modules(net)
    with pytest.raises(LayerError, match="No calibration batch calls"):
        quantize(net, [torch.randn(30, 6)], avg_bits=3, include=["idle"])


@pytest.mark.parametrize("method", ["cet", "caq"])
def test_attention(method):
    """The fused layer never calls its projections; what it does call is quantized, and nothing raises."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)).eval()
    before = net[0].self_attn.out_proj.weight.detach().clone()
    result = quantize(net, [torch.randn(48, 5, 8)], method=method, avg_bits=3, compare=())
    assert set(result.plan.bits) == {"0.linear1", "0.linear2", "2"}
    assert torch.equal(net[0].self_attn.out_proj.weight, before)
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_by_keyword():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=x)

    result = quantize(Net(), [torch.randn(30, 6)], avg_bits=3, compare=("caq",))
    assert result.plan.bits == {"fc": 3}


def test_the_quantized_network_can_be_trained_and_settled(net):
    result = quantize(net, _batches(), avg_bits=2, rounding="nearest", compare=(), **FAST)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    x, y = nets.images(512, 0)
    y = (y + 1) % 4  # the classes get other names: there is much to learn
    net.train()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    net.eval()
    expected = net(TEST[0]).detach()
    plan = result.plan.settled(net)
    torch.testing.assert_close(net(TEST[0]), expected)
    assert plan.bits == result.plan.bits


def test_export(net):
    quantize(net, _batches(), avg_bits=3, compare=(), **FAST)
    net.eval()
    exported = torch.export.export(net, (TEST[0][:2],))
    torch.testing.assert_close(exported.module()(TEST[0][:2]), net(TEST[0][:2]))


# --- what must not happen ---------------------------------------------------------------------------------------------


def _nan_weight(net):
    net[4].weight[0, 0, 0, 0] = float("nan")


def _inf_weight(net):
    net[10].weight[1, 1] = float("inf")


def _nan_bias(net):
    net[10].bias[0] = float("nan")


BAD_OPTIONS = {
    "no budget": ({"avg_bits": None}, BudgetError, "Got no budget; give exactly one"),
    "two budgets": ({"ratio": 8}, BudgetError, "Got two budgets"),
    "too small": ({"avg_bits": 1.5}, BudgetError, "avg_bits=1.5 cannot be met.*from 2 to 8"),
    "too large": ({"avg_bits": 9}, BudgetError, "avg_bits=9 cannot be met"),
    "ratio too large": ({"avg_bits": None, "ratio": 40}, BudgetError, "ratio=40 cannot be met.*the most that"),
    "ratio too small": ({"avg_bits": None, "ratio": 1.5}, BudgetError, "ratio=1.5 is already met"),
    "method": (
        {"method": "magic"},
        OptionError,
        "method='magic' is not known; choose from .*'caq', .*'cet', .*'uniform'",
    ),
    "rounding": ({"rounding": "up"}, OptionError, "rounding='up' is not known; choose from 'nearest'"),
    "objective": ({"objective": "l2"}, OptionError, "objective='l2' is not known; choose from 'distill', 'task'"),
    "batchnorm": ({"batchnorm": "no"}, OptionError, "batchnorm='no' is not known"),
    "compare": ({"compare": ["no"]}, OptionError, "compare='no' is not known"),
    "bits": ({"bits": [2, 40]}, OptionError, "bits=.* is not allowed"),
    "no loss": ({"objective": "task", "loss_fn": None}, OptionError, "objective='task' needs loss_fn"),
    "include": ({"include": ["head*"]}, OptionError, r"include pattern 'head\*' matches no layer; the layers are '0'"),
    "exclude": ({"exclude": ["head*"]}, OptionError, r"exclude pattern 'head\*' matches no layer"),
    "nothing left": ({"exclude": ["*"]}, LayerError, "include and exclude leave no layer"),
    "nan loss": (
        {"objective": "task", "loss_fn": lambda m, b: _loss(m, b) * float("nan")},
        CalibrationError,
        "loss of calibration batch 0 is nan",
    ),
    "late nan loss": (
        {"objective": "task", "loss_fn": lambda m, b: _loss(m, b) / (0 if len(b[0]) == 56 else 1)},
        CalibrationError,
        "loss of calibration batch 1 is inf",
    ),
    "loss no scalar": ({"objective": "task", "loss_fn": lambda m, b: m(b[0])}, CalibrationError, "must be a scalar"),
}

BAD_BATCHES = {
    "empty": ([], "batches is empty"),
    "one-shot": (iter([CALIBRATION]), "one-shot list_iterator"),
    "no list": (CALIBRATION[0], "put it in a list"),
    "of text": (["text"], "holds no samples"),
    "wrong shape": ([torch.randn(4, 3)], r"Sequential cannot take a calibration batch of float32\[4, 3\]"),
    "wrong type": ([CALIBRATION[0].long()], "cannot take a calibration batch of int64"),
    "nan": ([CALIBRATION[0], CALIBRATION[0] * float("nan")], "batch 1 holds NaN"),
    "huge": ([CALIBRATION[0] * 3e37], "NaN or infinite outputs"),
}

BAD_WEIGHTS = {
    "nan": (_nan_weight, LayerError, "Layer '4' holds NaN or infinite weights"),
    "inf": (_inf_weight, LayerError, "Layer '10' holds NaN or infinite weights"),
    "nan bias": (_nan_bias, CalibrationError, "returns NaN or infinite outputs"),
}


def _refused(net, act, error, message):
    optimizer = torch.optim.Adam(net.parameters())
    before, state = _picture(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message) as caught:
        act()
    # NaN is not equal to itself: compare what was stored.
    before["state"] = {k: v.nan_to_num(9e9) for k, v in before["state"].items()}
    after = _picture(net)
    after["state"] = {k: v.nan_to_num(9e9) for k, v in after["state"].items()}
    _same(before, after)
    assert optimizer.state_dict() == state
    assert isinstance(caught.value, CAQError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(net, name):
    options, error, message = BAD_OPTIONS[name]
    calls = []
    kwargs = {"avg_bits": 3, "loss_fn": _loss, "evaluate": lambda m: calls.append(1) or {}, **FAST, **options}
    _refused(net, lambda: quantize(net, _batches(), **kwargs), error, message)
    assert not calls  # before any work


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(net, name):
    batches, message = BAD_BATCHES[name]
    calls = []
    evaluate = lambda m: calls.append(1) or {}  # noqa: E731
    _refused(net, lambda: quantize(net, batches, avg_bits=3, evaluate=evaluate, **FAST), CalibrationError, message)
    assert not calls


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(net, name):
    spoil, error, message = BAD_WEIGHTS[name]
    with torch.no_grad():
        spoil(net)
    _refused(net, lambda: quantize(net, _batches(), avg_bits=3, **FAST), error, message)


def test_networks_without_layers():
    net, x = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(8, 4)
    _refused(net, lambda: quantize(net, [x], avg_bits=3), LayerError, "no layer that can be quantized")
    with pytest.raises(LayerError, match="no layer that can be quantized"):
        quantize(nn.Sequential(nn.ReLU()), [x], avg_bits=3)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_networks():
    with pytest.raises(LayerError, match="Layer '0' is lazy"):
        quantize(nn.Sequential(nn.LazyLinear(4)), [torch.randn(8, 4)], avg_bits=3)


def test_a_quantized_network_is_not_quantized_again(net):
    quantize(net, _batches(), avg_bits=3, compare=(), **FAST)
    _refused(net, lambda: quantize(net, _batches(), avg_bits=3), LayerError, "is quantized already")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_evaluation_that_fails_leaves_the_float_network(net, error, call):
    """After the float network, the quantized one and the compared one."""
    calls = []

    def evaluate(model):
        calls.append(1)
        torch.rand(3), np.random.rand(3), random.random()
        if len(calls) == call:
            raise error("stop")
        return {"acc": 1.0}

    before = _picture(net)
    with pytest.raises(error, match="stop"):
        quantize(net, _batches(), avg_bits=3, evaluate=evaluate, **FAST)
    assert len(calls) == call
    _same(before, _picture(net))
    quantize(net, _batches(), avg_bits=3, compare=(), **FAST)  # and it can be quantized still


@pytest.mark.parametrize("call", [1, 3, 8, 20])
def test_a_loss_that_fails_leaves_the_float_network(net, call):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return _loss(model, batch)

    before = _picture(net)
    with pytest.raises(KeyboardInterrupt):
        quantize(net, _batches(), avg_bits=3, objective="task", loss_fn=loss, **FAST)
    _same(before, _picture(net))


def test_a_report_that_fails_leaves_the_float_network(net, monkeypatch):
    """The last step, after the modules were swapped."""
    monkeypatch.setattr("lightning_caq.pipeline.versions", lambda: 1 / 0)
    before = _picture(net)
    with pytest.raises(ZeroDivisionError):
        quantize(net, _batches(), avg_bits=3, compare=(), **FAST)
    _same(before, _picture(net))


def test_evaluations_must_give_numbers(net):
    before = _picture(net)
    with pytest.raises(TypeError):
        quantize(net, _batches(), avg_bits=3, evaluate=lambda m: {"acc": None}, **FAST)
    _same(before, _picture(net))


def test_layers_by_their_order_of_execution(net):
    names = [layer.name for layer in find_layers(net.eval(), CALIBRATION[0])]
    assert list(quantize(net, _batches(), avg_bits=3, compare=(), **FAST).plan.bits) == names


def test_a_second_budget_costs_no_second_measurement():
    net, batches = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(40, 6)]
    first = quantize(net, batches, avg_bits=3, inplace=False, guard=False)
    said = []
    second = quantize(net, batches, avg_bits=4, profile=first.profile, inplace=False, guard=False, say=said.append)
    assert second.profile is first.profile
    assert any("measured before" in line for line in said)
    fresh = quantize(net, batches, avg_bits=4, inplace=False, guard=False)
    assert second.plan.bits == fresh.plan.bits
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    assert (
        quantize(net, batches, avg_bits=4, profile=first.profile, inplace=False, guard=False).profile
        is not first.profile
    )
    other = quantize(net, [batches[0] + 1], avg_bits=4, profile=fresh.profile, inplace=False, guard=False)
    assert other.profile is not fresh.profile


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_too_where_asked(net, bits):
    floats = copy.deepcopy(net).eval()
    result = quantize(net, _batches(), avg_bits=8, activation_bits=bits, method="uniform", compare=(), **FAST)
    assert list(result.plan.activation_bits.values()) == [8] + [bits] * (len(result.plan.layers) - 1)
    seen = {}
    for name, module in quantized_modules(net).items():
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: m.rounded_input(x[0])}))
    with torch.no_grad():
        outputs = result.model.eval()(TEST[0])
    last = list(seen)[-1]
    assert len(seen[last].unique()) <= 2**bits
    assert float(nets.kl(floats(TEST[0]).detach(), outputs)) < (0.5 if bits == 4 else 0.01)
    assert result.report.metrics["quantized/distill"] > 0


@pytest.mark.parametrize("bits", [1, 9, True, "4"])
def test_bits_of_inputs_must_be_whole_numbers_from_2_to_8(net, bits):
    _refused(
        net,
        lambda: quantize(net, _batches(), avg_bits=3, activation_bits=bits, **FAST),
        OptionError,
        "activation_bits=.* is not allowed; give a whole number from 2 to 8",
    )
