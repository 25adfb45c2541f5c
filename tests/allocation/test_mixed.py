"""Bits of weights and inputs chosen together: against every choice, and carried out from end to end."""

import copy
import json
from dataclasses import replace
from itertools import product

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import CurvatureProfile, CurvatureQuantizationCallback, QuantizationReport, quantize
from lightning_caq.allocation.budget import AvgBits, Bops, Ratio, SizeAndBops
from lightning_caq.allocation.choose import Choice, Chooser
from lightning_caq.allocation.methods import register_method
from lightning_caq.allocation.mixed import check_mixed, choose_mixed, input_candidates
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.export.onnx import export_onnx
from lightning_caq.export.packed import load_quantized, save_quantized
from lightning_caq.network.layers import find_layers
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import LayerCurvature
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.sizes import LayerSizes

BITS = (2, 3, 4, 8)
CANDIDATES = ((8, 8, 8, 8), BITS, BITS)
FAST = {"curvature_samples": 48, "eigenpairs": 8, "compare": (), "bits": BITS}


def _made_up(seed):
    """Three layers whose damages fall with bits, and their sizes."""
    rng = np.random.default_rng(seed)

    def falling():
        return dict(zip(BITS, (-np.sort(-rng.exponential(size=4))).tolist(), strict=True))

    n, m = rng.integers(10, 100, 3).tolist(), (10**6 * rng.integers(10, 100, 3)).tolist()
    rows = [LayerCurvature(f"l{i}", n[i], 2, m[i], second_order=falling(), activation_cost=falling()) for i in range(3)]
    return CurvatureProfile(tuple(rows)), LayerSizes(tuple(n), (2, 2, 2), macs=tuple(m))


def _best(profile, sizes, fits):
    """The least cost of all choices that fit, by trying every one; the first input has 8 bits and costs nothing."""
    best = np.inf
    for b in product(BITS, repeat=3):
        for a in product((8,), BITS, BITS):
            if fits(sum(n * x for n, x in zip(sizes.weights, b, strict=True)),
                    sum(m * x * y for m, x, y in zip(sizes.macs, b, a, strict=True)) / 1e9):  # fmt: skip
                best = min(best, _cost(profile, b, a))
    return best


def _cost(profile, bits, inputs):
    weights = sum(0.5 * row.second_order[b] for row, b in zip(profile.layers, bits, strict=True))
    return weights + sum(row.activation_cost[a] for row, a in zip(profile.layers[1:], inputs[1:], strict=True))


@every("seed", range(6))
def test_the_cheapest_of_all_pairs_within_the_operations(seed):
    profile, sizes = _made_up(seed)
    limit = sum(sizes.macs) * 4 * 4 / 1e9
    bits, inputs = choose_mixed("mckp", Bops(limit), profile=profile, sizes=sizes, bits=BITS, candidates=CANDIDATES)
    assert inputs[0] == 8
    assert replace(sizes, activation_bits=inputs).bops(bits) <= limit
    best = _best(profile, sizes, lambda size, bops: bops <= limit)
    assert _cost(profile, bits, inputs) == pytest.approx(best, rel=1e-5)


@every("seed", range(6))
@every("kind", [AvgBits, Ratio])
def test_the_cheapest_of_all_pairs_within_size_and_operations(seed, kind):
    profile, sizes = _made_up(seed)
    most, limit = 3.2 * sum(sizes.weights), sum(sizes.macs) * 4 * 4 / 1e9
    value = 3.2 if kind is AvgBits else 32 * sum(sizes.weights) / (most + 48 * 6)  # 48 bits of scale a channel
    budget = SizeAndBops(kind(value), Bops(limit))
    bits, inputs = choose_mixed("mckp", budget, profile=profile, sizes=sizes, bits=BITS, candidates=CANDIDATES)
    assert sizes.payload(bits) <= most * (1 + 1e-12)
    assert replace(sizes, activation_bits=inputs).bops(bits) <= limit
    best = _best(profile, sizes, lambda size, bops: size <= most * (1 + 1e-12) and bops <= limit)
    assert _cost(profile, bits, inputs) == pytest.approx(best, rel=1e-5)


def test_a_loss_that_falls_counts_as_none():
    costs = {"second_order": dict.fromkeys(BITS, 1.0)}
    rows = [LayerCurvature(str(i), 1, 1, 1, **costs, activation_cost=dict.fromkeys(BITS, 0.0)) for i in range(2)]
    falling = replace(rows[1], activation_cost={2: -5.0, 3: 0.0, 4: 0.0, 8: 0.0})
    sizes = LayerSizes((1, 1), (1, 1), macs=(10**9, 10**9))
    profile = CurvatureProfile((rows[0], falling))
    _, inputs = choose_mixed("mckp", Bops(1e3), profile=profile, sizes=sizes, bits=BITS, candidates=CANDIDATES[:2])
    assert inputs == (8, 8)


@every("seed", range(4))
def test_uniform_has_one_width_of_inputs_and_fits(seed):
    profile, sizes = _made_up(seed)
    chooser = Chooser(profile, sizes, BITS, 1.0, lambda bits: 0.0, 0, inputs=CANDIDATES)
    limit = sum(sizes.macs) * 4 * 4.5 / 1e9
    bits, inputs = chooser.choose("uniform", Bops(limit))
    assert inputs[0] == 8
    assert len(set(inputs[1:])) == 1
    noise = np.inf
    for a in BITS:
        for b in product(BITS, repeat=3):
            if replace(sizes, activation_bits=(8, a, a)).bops(b) <= limit:
                pairs = zip(sizes.weights, b, (8, a, a), strict=True)
                noise = min(noise, sum(n * (4.0**-x + 4.0**-y) for n, x, y in pairs))
    pairs = zip(sizes.weights, bits, inputs, strict=True)
    assert sum(n * (4.0**-x + 4.0**-y) for n, x, y in pairs) == pytest.approx(noise, rel=1e-5)
    assert replace(sizes, activation_bits=inputs).bops(bits) <= limit
    assert isinstance(chooser.choose("mckp", Bops(limit)), Choice)


def test_too_few_operations():
    profile, sizes = _made_up(0)
    for method in ("mckp", "uniform"):
        with pytest.raises(BudgetError, match="The smallest choice takes"):
            choose_mixed(method, Bops(1e-9), profile=profile, sizes=sizes, bits=BITS, candidates=CANDIDATES)
        with pytest.raises(BudgetError, match="says nothing about operations"):
            choose_mixed(method, AvgBits(3), profile=profile, sizes=sizes, bits=BITS, candidates=CANDIDATES)


def test_candidates_are_those_of_weights_from_2_up():
    layers = find_layers(nets.mlp(), torch.zeros(1, 4))
    assert input_candidates(len(layers), (1, 2, 6), "mixed") == ((8, 8), (2, 6))
    assert input_candidates(len(layers), (1, 2, 6), None) == ()


@every(
    ("options", "message"),
    [
        ({"avg_bits": 3}, "activation_bits='mixed' needs a budget of operations; give bops"),
        ({"error": 0.1, "method": "caq"}, "activation_bits='mixed' needs a budget of operations"),
        ({"bops": 1, "granularity": "channel_group"}, "activation_bits='mixed' needs granularity='layer'"),
        ({"bops": 1, "bits": [1]}, "takes its widths from bits=.*; add one from 2 to 8"),
        ({"bops": 1, "method": "caq"}, "method 'caq', whose costs are no changes of the loss in nat.*'cet', 'cet_exp"),
        ({"bops": 1, "method": "hawq_v2"}, "cannot be had with method 'hawq_v2'"),
        ({"bops": 1, "compare": ["evolution"]}, "cannot be had with method 'evolution'"),
        ({"bops": 1, "compare": ["cet_subspace"]}, "cannot be had with method 'cet_subspace'"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        QuantizationOptions(activation_bits="mixed", **options)


@every("method", ["cet", "cet_expected", "mckp", "zeroq", "uniform"])
def test_methods_that_take_part(method):
    options = QuantizationOptions(method=method, bops=1, activation_bits="mixed")
    assert "activation_cost" in options.needs


def test_a_method_of_ones_own_takes_part_if_it_says_so():
    class InNat:
        needs, in_nat = frozenset({"subspace"}), True

        def costs(self, profile, bits):
            return [[0.0] * len(bits) for _ in profile.layers]

    register_method("in_nat_of_ones_own", InNat())
    check_mixed("in_nat_of_ones_own")


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return nets.trained(nets.small_cnn(), *nets.images(512, 0), steps=100).eval()


@pytest.fixture(scope="module")
def done(trained):
    """A mixed network at the operations of 4-bit weights and inputs."""
    x, y = nets.images(96, 1)
    macs = [layer.macs for layer in find_layers(trained, x)]
    bops = (macs[0] * 4 * 8 + sum(macs[1:]) * 4 * 4) / 1e9
    result = quantize(trained, [(x, y)], bops=bops, activation_bits="mixed", guard=False, inplace=False, **FAST)
    return result, bops


def test_the_network_keeps_the_operations_and_rounds_its_inputs(trained, done):
    result, bops = done
    plan = result.plan
    macs = {layer.name: layer.macs for layer in find_layers(trained, nets.images(4, 1)[0])}
    did = sum(macs[name] * plan.bits[name] * plan.activation_bits[name] for name in macs) / 1e9
    assert did <= bops
    assert did == pytest.approx(plan.sizes.bops(list(plan.bits.values())))
    assert next(iter(plan.activation_bits.values())) == 8
    assert tuple(plan.activation_bits.values()) == plan.sizes.activation_bits
    seen = {}
    for name, module in result.model.named_modules():
        if name in plan.activation_bits:
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.update({name: rounding_state(m).rounded_input(x[0])})
            )
    with torch.no_grad():
        result.model(nets.images(64, 3)[0])
    assert all(len(seen[name].unique()) <= 2**bits for name, bits in plan.activation_bits.items())


def test_the_report_says_the_bits_of_inputs(done, tmp_path):
    result, _ = done
    report, plan = result.report, result.plan
    assert {row.name: row.input_bits for row in report.layers} == {
        name: {"quantized": bits} for name, bits in plan.activation_bits.items()
    }
    header, rows = report.layer_cells()
    assert [row[header.index("input bits")] for row in rows] == [str(b) for b in plan.activation_bits.values()]
    assert QuantizationReport.from_json(report.to_json()) == report
    assert report.options["activation_bits"] == "mixed"
    page = result.to_html(tmp_path / "report.html").read_text()
    assert "input bits" in page
    assert "Inputs of layers are rounded too" in page
    assert "activation_bits=&#x27;mixed&#x27;" in page or "activation_bits=&#39;mixed&#39;" in page


def test_a_second_budget_measures_nothing_anew(trained, done):
    result, bops = done
    profile = CurvatureProfile.from_json(result.profile.to_json())
    assert profile == result.profile
    assert all(set(row.activation_cost) == set(BITS) for row in profile.layers)
    again = quantize(
        trained, [nets.images(96, 1)], bops=0.8 * bops, activation_bits="mixed", guard=False, profile=profile,
        inplace=False, **FAST,
    )  # fmt: skip
    assert again.profile is profile
    assert again.plan.sizes.bops(list(again.plan.bits.values())) <= 0.8 * bops


def test_profiles_from_before_load(done):
    data = json.loads(done[0].profile.to_json())
    for row in data["layers"]:
        del row["activation_cost"]
    assert CurvatureProfile.from_json(json.dumps(data)).layers[0].activation_cost == {}


def test_the_guard_compares_with_uniform_bits_of_both(trained):
    x, y = nets.images(96, 1)
    result = quantize(
        trained,
        [(x, y)],
        ratio=8,
        bops=0.0004,
        activation_bits="mixed",
        inplace=False,
        **(FAST | {"compare": ("uniform",)}),
    )
    inputs = [row.input_bits["uniform"] for row in result.report.layers]
    assert inputs[0] == 8
    assert len(set(inputs[1:])) == 1
    assert result.plan.ratio >= 8


def test_what_cannot_be_met_is_told_before_any_work(trained):
    for bops, message in (
        (1e-7, "cannot be met: with every layer at 2 bits"),
        (50, "already met with every layer at 8"),
    ):
        with pytest.raises(BudgetError, match=message):
            quantize(trained, [nets.images(32, 1)], bops=bops, activation_bits="mixed", inplace=False, **FAST)


def test_round_trips_are_exact(trained, done, tmp_path):
    result, _ = done
    x = nets.images(40, 4)[0]
    with torch.no_grad():
        expected = result.model(x)
        loaded = copy.deepcopy(trained)
        QuantizationPlan.load(result.plan.save(tmp_path / "plan.json")).apply(loaded)
        assert torch.equal(loaded.eval()(x), expected)
        fresh = load_quantized(nets.small_cnn(), save_quantized(result.model, tmp_path / "net.safetensors"))
        assert torch.equal(fresh.eval()(x), expected)
    for net in (loaded, fresh):
        grids = {name: rounding_state(module).input_grid for name, module in quantized_modules(net).items()}
        assert grids == {layer.name: layer.input_grid for layer in result.plan.layers}


def test_onnx_runtime_agrees(done, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    result, _ = done
    x = nets.images(40, 4)[0]
    path = export_onnx(copy.deepcopy(result.model), tmp_path / "net.onnx", x[:4]).path
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), result.model(x), rtol=1e-4, atol=1e-4)


def test_words_are_left():
    words, tokens = nets.Words().eval(), torch.randint(0, 6, (24, 4))
    words.out = nn.Linear(3, 6, bias=False)
    macs = [layer.macs for layer in find_layers(words, tokens)]
    result = quantize(
        words, [tokens], bops=sum(macs) * 16 / 1e9, activation_bits="mixed", guard=False, **(FAST | {"bits": (2, 4, 6)})
    )
    assert list(result.plan.activation_bits) == ["mix", "out"]
    assert result.report.layers[0].input_bits == {}


def test_the_callback_takes_both_forms():
    assert CurvatureQuantizationCallback(bops=1, activation_bits="mixed").options.activation_bits == "mixed"
    assert CurvatureQuantizationCallback(avg_bits=3, activation_bits=4).options.activation_bits == 4
