"""``quantize`` from end to end, on a small network that was trained on data that can be learnt."""

import copy
import json

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq import CurvatureProfile, QuantizationReport, quantize
from lightning_caq.network.layers import find_layers
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

CALIBRATION, TEST = nets.images(96, 1), nets.images(400, 2)
FAST = {"curvature_samples": 48, "eigenpairs": 8}


def _evaluate(net):
    return {"acc": nets.accuracy(net, *TEST)}


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
        net, nets.image_batches(), avg_bits=4, method=method, objective=objective, loss_fn=nets.image_loss,
        evaluate=_evaluate, compare=(), guard=False, **FAST,
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
        net, nets.image_batches(), avg_bits=2.5, method="uniform", rounding=rounding, batchnorm=batchnorm, compare=()
    )
    _check(result, SIZES)
    state = net.state_dict()
    changed = {k for k, v in state.items() if not torch.equal(v, kept[k])}
    assert changed == {"0.weight", "4.weight", "10.weight"} | result.plan.repairs.keys()
    assert (batchnorm == "keep") <= (result.plan.repairs == {})
    for name, module in quantized_modules(net).items():
        nearest = torch.equal(module.weight, rounding_state(module).grid.nearest(kept[f"{name}.weight"]))
        assert nearest == (rounding == "nearest")
    assert torch.equal(state["1.num_batches_tracked"], kept["1.num_batches_tracked"])


def test_feedback_and_repair_bring_the_outputs_nearer_to_the_float_ones(net):
    found = {}
    for rounding, batchnorm in (("nearest", "keep"), ("nearest", "recentre"), ("error_feedback", "recentre")):
        result = quantize(
            net, nets.image_batches(), avg_bits=2, method="uniform", rounding=rounding, batchnorm=batchnorm, compare=(),
            inplace=False,
        )  # fmt: skip
        with torch.no_grad():
            outputs = copy.deepcopy(net).eval()(TEST[0])
            found[rounding, batchnorm] = float(nets.kl(outputs, result.model.eval()(TEST[0])))
    assert found["error_feedback", "recentre"] < found["nearest", "recentre"] < found["nearest", "keep"]


@pytest.mark.parametrize("seed", range(8))
def test_budgets_are_hard(net, seed):
    rng = np.random.default_rng(seed)
    method = ("caq", "cet")[seed % 2]
    kwargs = {"method": method, "rounding": "nearest", "batchnorm": "keep", "compare": ("uniform",), "guard": False}
    avg_bits, ratio = rng.uniform(2, 8), rng.uniform(3.0, 8.0)
    result = quantize(net, nets.image_batches(), avg_bits=avg_bits, inplace=False, **kwargs, **FAST)
    _check(result, SIZES)
    assert all(size.avg_bits <= avg_bits for name, size in result.report.sizes.items() if name != "float")
    result = quantize(net, nets.image_batches(), ratio=ratio, **kwargs, **FAST)
    _check(result, SIZES)
    assert all(size.ratio >= ratio for name, size in result.report.sizes.items() if name != "float")


def test_curvature_puts_bits_where_they_count(trained_cnn):
    """A last layer that is ignored but for one class-blind sum gets the fewest bits from both methods."""
    net = copy.deepcopy(trained_cnn)
    with torch.no_grad():
        net[10].weight.copy_(net[10].weight.mean(0, keepdim=True) + 1e-3 * net[10].weight)
    for method in ("cet", "caq"):
        result = quantize(net, nets.image_batches(), avg_bits=4, method=method, compare=(), inplace=False, **FAST)
        assert result.plan.bits["10"] >= max(result.plan.bits["0"], result.plan.bits["4"])


def test_out_of_place_leaves_the_original_alone(net):
    before = nets.picture(net)
    result = quantize(net, nets.image_batches(), avg_bits=3, inplace=False, compare=(), **FAST)
    nets.assert_same_picture(before, nets.picture(net))
    assert result.model is not net
    assert quantized_modules(result.model)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in result.model.parameters()}


def test_in_place_leaves_everything_else_alone(net):
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = None
    before = nets.picture(net)
    result = quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST)
    after = nets.picture(net)
    for key in ("ids", "flags", "grads", "hooks"):
        assert before[key] == after[key]
    assert torch.equal(before["rng"][0], after["rng"][0])
    assert before["rng"][1:] == after["rng"][1:]
    changed = {k for k, v in after["state"].items() if not torch.equal(v, before["state"][k])}
    assert changed == {"0.weight", "4.weight", "10.weight"} | result.plan.repairs.keys()
    assert all(p.grad is None for p in net.parameters())


def test_is_the_same_every_time(net):
    kwargs = {"avg_bits": 3, "evaluate": _evaluate, "objective": "task", "loss_fn": nets.image_loss, **FAST}
    kwargs["inplace"] = False
    first = quantize(net, nets.image_batches(), **kwargs)
    torch.manual_seed(99)
    np.random.seed(99)
    again = quantize(net, nets.image_batches(), **kwargs)
    assert first.plan.bits == again.plan.bits
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first.plan.layers, again.plan.layers, strict=True))
    assert first.profile.layers == again.profile.layers
    assert first.report.metrics == again.report.metrics
    other = quantize(net, nets.image_batches(), **kwargs, seed=1)
    assert [r.trace for r in first.profile.layers] != [r.trace for r in other.profile.layers]


def test_evaluate_sees_each_network_once(net):
    seen = []

    def evaluate(model):
        assert model is net
        assert not model.training
        seen.append(copy.deepcopy(model.state_dict()))
        return {"n": len(seen)}

    before = copy.deepcopy(net.state_dict())
    result = quantize(net, nets.image_batches(), avg_bits=3, evaluate=evaluate, compare=("uniform", "caq"), **FAST)
    assert [result.report.metrics[f"{v}/n"] for v in ("float", "quantized", "uniform", "caq")] == [1, 2, 3, 4]
    assert all(torch.equal(v, before[k]) for k, v in seen[0].items())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in seen[1].items())
    for state in seen[2:]:
        assert max(len(row.unique()) for row in state["0.weight"].flatten(1)) <= 2**8
        assert not torch.equal(state["0.weight"], before["0.weight"])


def test_compared_methods_are_what_they_are_alone(net):
    both = quantize(net, nets.image_batches(), avg_bits=2.5, method="cet", evaluate=_evaluate, inplace=False, **FAST)
    alone = quantize(net, nets.image_batches(), avg_bits=2.5, method="uniform", evaluate=_evaluate, compare=(), **FAST)
    for metric in ("acc", "distill"):
        assert both.report.metrics[f"uniform/{metric}"] == alone.report.metrics[f"quantized/{metric}"]
    assert both.report.sizes["uniform"] == alone.report.sizes["quantized"]


def test_the_objective_that_is_reported_is_right(net):
    result = quantize(net, nets.image_batches(), avg_bits=2.5, compare=(), inplace=False, **FAST)
    with torch.no_grad():
        expected = nets.kl(copy.deepcopy(net).eval()(CALIBRATION[0]), result.model.eval()(CALIBRATION[0]))
    assert result.report.metrics["float/distill"] == pytest.approx(0, abs=1e-7)
    assert result.report.metrics["quantized/distill"] == pytest.approx(float(expected), rel=1e-4)


def test_report_and_profile(net):
    result = quantize(net, nets.image_batches(), avg_bits=3, evaluate=_evaluate, seed=7, **FAST)
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
    quantize(net, nets.image_batches(), avg_bits=3, compare=(), say=lines.append, **FAST)
    assert all(line.startswith("caq: ") for line in lines)
    assert "Output 'output' of shape [40, 4] is taken as classes" in lines[0]
    (estimate,) = (line for line in lines if "about" in line and "measuring on" in line)
    assert "3 layers, 776 weights, 96 samples, cet with avg_bits=3; measuring on 48 samples: about" in estimate
    assert all(part in estimate for part in ("2 networks", "their validation", "curvature"))


def test_excluded_layers_stay_float_and_count(net):
    weight = net[0].weight.detach().clone()
    result = quantize(net, nets.image_batches(), avg_bits=3, exclude=["0"], compare=(), **FAST)
    _check(result, SIZES)
    assert torch.equal(net[0].weight, weight)
    assert type(net[0]) is nn.Conv2d
    assert list(result.plan.bits) == ["4", "10"]


def test_data_loaders_and_dicts(net):
    loader = DataLoader(TensorDataset(*CALIBRATION), batch_size=32, shuffle=True)
    state = torch.get_rng_state()
    result = quantize(net, loader, avg_bits=3, compare=(), **FAST)
    _check(result, SIZES)
    assert torch.equal(state, torch.get_rng_state())

    named, x = nets.Named(), torch.randn(40, 3)
    batches = [{"a": x, "b": x[:, :2], "label": torch.zeros(40)}]
    assert quantize(named, batches, avg_bits=3, **FAST).plan.bits.keys() == {"left", "right", "out"}


def test_the_quantized_network_can_be_trained_and_settled(net):
    result = quantize(net, nets.image_batches(), avg_bits=2, rounding="nearest", compare=(), **FAST)
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
    quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST)
    net.eval()
    exported = torch.export.export(net, (TEST[0][:2],))
    torch.testing.assert_close(exported.module()(TEST[0][:2]), net(TEST[0][:2]))


def test_layers_by_their_order_of_execution(net):
    names = [layer.name for layer in find_layers(net.eval(), CALIBRATION[0])]
    assert list(quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST).plan.bits) == names


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
    result = quantize(net, nets.image_batches(), avg_bits=8, activation_bits=bits, method="uniform", compare=(), **FAST)
    assert list(result.plan.activation_bits.values()) == [8] + [bits] * (len(result.plan.layers) - 1)
    seen = {}
    for name, module in quantized_modules(net).items():
        module.register_forward_hook(
            lambda m, x, y, name=name: seen.update({name: rounding_state(m).rounded_input(x[0])})
        )
    with torch.no_grad():
        outputs = result.model.eval()(TEST[0])
    last = list(seen)[-1]
    assert len(seen[last].unique()) <= 2**bits
    assert float(nets.kl(floats(TEST[0]).detach(), outputs)) < (0.5 if bits == 4 else 0.01)
    assert result.report.metrics["quantized/distill"] > 0
