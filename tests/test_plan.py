"""Plans: round trips that keep every bit, and networks they do not belong to."""

import copy
import io
import json
from dataclasses import replace

import nets
import pytest
import torch
from every import every
from safetensors.torch import load_file
from torch import nn

from lightning_caq import QuantizationPlan, quantize
from lightning_caq.errors import CAQError, PlanError
from lightning_caq.quantizers.fake_quant.modules import on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.utilities.fingerprint import fingerprint

X = nets.images(48, 3)[0]


@pytest.fixture(scope="module")
def done():
    """A float network, the quantized one and its plan, with repairs of both kinds."""
    torch.manual_seed(0)
    net = nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=40).eval()
    quantized = copy.deepcopy(net)
    result = quantize(
        quantized, [nets.images(64, 1)[0]], avg_bits=2.5, method="uniform", rounding="nearest", compare=()
    )
    assert {"1.running_mean", "10.bias"} <= set(result.plan.repairs)
    return net, quantized, result.plan


def _same_plan(a, b):
    assert (a.method, a.budget, a.rounding, a.sizes, a.fingerprint) == (
        b.method,
        b.budget,
        b.rounding,
        b.sizes,
        b.fingerprint,
    )
    assert (a.bits, a.avg_bits, a.ratio, a.bytes) == (b.bits, b.avg_bits, b.ratio, b.bytes)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x.name, x.modules) == (y.name, y.modules)
        assert torch.equal(x.codes, y.codes)
        assert x.codes.dtype == y.codes.dtype == torch.uint8
        assert torch.equal(x.grid.scale, y.grid.scale)
        assert torch.equal(x.grid.zero_point, y.grid.zero_point)
    assert a.repairs.keys() == b.repairs.keys()
    assert all(torch.equal(t, b.repairs[k]) for k, t in a.repairs.items())


def _same_state(a, b):
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in state.items())


def test_saved_and_loaded(done, tmp_path):
    net, quantized, plan = done
    path = plan.save(tmp_path / "deep" / "plan.json")
    assert path == tmp_path / "deep" / "plan.json"
    assert path.with_suffix(".safetensors").exists()
    loaded = QuantizationPlan.load(path)
    _same_plan(plan, loaded)
    other = copy.deepcopy(net)
    loaded.apply(other)
    _same_state(other, quantized)
    assert torch.equal(other(X), quantized(X))
    assert quantized_modules(other).keys() == quantized_modules(quantized).keys()


@every("name", ["plan-2.25", "plan.json", "plan.safetensors", "v1.2.json"])
def test_names_of_files(done, tmp_path, name):
    done[2].save(tmp_path / name)
    _same_plan(done[2], QuantizationPlan.load(str(tmp_path / name)))


def test_plans_of_different_budgets_do_not_overwrite_each_other(done, tmp_path):
    paths = {done[2].save(tmp_path / f"plan-{bits}") for bits in (2.25, 2.5)}
    assert len(paths) == 2


def test_the_description_can_be_read_by_people(done, tmp_path):
    data = json.loads(done[2].save(tmp_path / "plan").read_text())
    assert (data["version"], data["method"], data["budget"]) == (2, "uniform", "avg_bits=2.5")
    assert [x["name"] for x in data["layers"]] == ["0", "4", "10"]
    assert {x["name"]: x["bits"] for x in data["layers"]} == done[2].bits


def test_sizes_by_hand(done):
    plan = done[2]
    weights = {"0": 8 * 9, "4": 8 * 8 * 9, "10": 4 * 32}
    bits = sum(n * plan.bits[name] for name, n in weights.items())
    everything = bits + 48 * (8 + 8 + 4)
    assert plan.avg_bits == pytest.approx(bits / sum(weights.values()))
    assert plan.ratio == pytest.approx(32 * sum(weights.values()) / everything)
    assert plan.bytes == -(-everything // 8)


def test_through_a_checkpoint_that_allows_plain_containers_only(done):
    file = io.BytesIO()
    torch.save({"plan": done[2].state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["plan"]
    assert state["version"] == 2
    _same_plan(done[2], QuantizationPlan.from_state_dict(state))


def test_the_file_holds_codes_at_their_bit_width(done, tmp_path):
    plan = done[2]
    path = plan.save(tmp_path / "plan").with_suffix(".safetensors")
    stored = {name: x.nbytes for name, x in load_file(path).items() if name.startswith("codes/")}
    assert stored == {f"codes/{x.name}": -(-x.codes.numel() * plan.bits[x.name] // 8) for x in plan.layers}


def test_plans_with_a_byte_for_each_code_are_read(done):
    plan = done[2]
    state = plan.state_dict()
    tensors = state["tensors"] | {f"codes/{x.name}": x.codes for x in plan.layers}
    old = {**state, "version": 1, "tensors": tensors, "tensors_fingerprint": fingerprint(tensors)}
    _same_plan(plan, QuantizationPlan.from_state_dict(old))


def test_applying_again_changes_nothing(done):
    _, quantized, plan = done
    other = copy.deepcopy(quantized)
    plan.apply(other)
    _same_state(other, quantized)
    restore_modules(other)
    plan.apply(other)
    _same_state(other, quantized)


def test_in_a_plain_network_the_weights_give_the_quantized_outputs(done):
    net, quantized, _ = done
    plain = copy.deepcopy(net)
    plain.load_state_dict(quantized.state_dict())
    torch.testing.assert_close(plain(X), quantized(X))


def test_attaching_to_weights_from_a_checkpoint(done):
    net, quantized, plan = done
    other = copy.deepcopy(net)
    assert plan.attach(other) is False
    _same_state(other, net)
    assert not quantized_modules(other)
    other.load_state_dict(quantized.state_dict())
    assert plan.attach(other) is True
    _same_state(other, quantized)
    assert torch.equal(other(X), quantized(X))


def test_settling_after_training_on(done):
    _, quantized, plan = done
    other = nets.trained(copy.deepcopy(quantized), *nets.images(128, 5), steps=20).eval()
    expected = other(X).detach()
    assert not on_grid(other[4].weight, rounding_state(other[4]).grid)
    settled = plan.settled(other)
    torch.testing.assert_close(other(X), expected)  # the network computed with these values all along
    assert on_grid(other[4].weight, rounding_state(other[4]).grid)
    assert settled.bits == plan.bits
    assert not torch.equal(settled.layers[1].codes, plan.layers[1].codes)
    assert torch.equal(settled.layers[1].grid.scale, plan.layers[1].grid.scale)

    # The new plan belongs to the weights it left behind, and finds them in a fresh network.
    plain = copy.deepcopy(other)
    restore_modules(plain)
    settled.apply(plain)
    _same_state(plain, other)
    assert torch.equal(plain(X), other(X))
    with pytest.raises(PlanError):
        plan.apply(plain)


def test_tied_and_repeated_modules(tmp_path):
    for net, batch in ((nets.Words(), torch.randint(0, 6, (8, 5))), (nets.Twice(), torch.randn(16, 4))):
        original = copy.deepcopy(net)
        plan = quantize(net, [batch], avg_bits=4, method="uniform", compare=()).plan
        assert len(plan.layers) == 2
        assert len(plan.layers[0].modules) == 2
        plan = QuantizationPlan.load(plan.save(tmp_path / "plan"))
        plan.apply(original)
        assert torch.equal(original(batch), net(batch))
        assert len(quantized_modules(original)) == (3 if isinstance(net, nets.Words) else 2)
    assert original.first is original.second


def test_a_network_of_one_layer(tmp_path):
    net, x = nn.Linear(6, 5), torch.randn(40, 6)
    original = copy.deepcopy(net)
    plan = quantize(net, [x], avg_bits=3, compare=()).plan
    QuantizationPlan.load(plan.save(tmp_path / "plan")).apply(original)
    assert torch.equal(original(x), net(x))


def _untouched(net, act, match):
    state, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(PlanError, match=match) as error:
        act()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [type(m) for m in net.modules()] == classes
    assert isinstance(error.value, CAQError)
    assert isinstance(error.value, ValueError)


def test_other_weights(done):
    net, _, plan = done
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[10].weight[0, 0] += 1e-6
    words = r"other weights than those in Sequential.*last float checkpoint of that run.*quantized\.ckpt"
    _untouched(other, lambda: plan.apply(other), words)


@every(
    ("change", "match"),
    [
        (lambda net: net.__setitem__(10, nn.Linear(32, 5)), r"layer '10' with a weight \[4, 32\].*\[5, 32\] there"),
        (lambda net: net.__delitem__(10), "layer '10'.*no such layer"),
        (lambda net: net.__setitem__(10, nn.ReLU()), "layer '10'.*no such layer"),
        (lambda net: net.__setitem__(1, nn.Identity()), "no '1.running_mean' of its shape"),
        (lambda net: net.__setitem__(10, nn.Linear(32, 4, bias=False)), "no '10.bias' of its shape"),
    ],
)
def test_other_networks(done, change, match):
    net, _, plan = done
    other = copy.deepcopy(net)
    change(other)
    _untouched(other, lambda: plan.apply(other), f"belongs to another network.*{match}")
    _untouched(other, lambda: plan.attach(other), "belongs to another network")
    _untouched(other, lambda: plan.settled(other), "belongs to another network")


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _reshaped(path):
    layers = json.loads(path.read_text())["layers"]
    return [{**layers[0], "shape": [1, *layers[0]["shape"]][:-1]}, *layers[1:]]


@every(
    ("damage", "match"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: path.with_suffix(".safetensors").unlink(), "cannot be read: No such file"),
        (lambda path: path.write_text("{"), "damaged"),
        (lambda path: path.write_text("[1]"), "not a quantization plan"),
        (lambda path: path.write_text("{}"), "not a quantization plan"),
        (lambda path: path.with_suffix(".safetensors").write_bytes(b"1234"), "damaged"),
        (lambda path: _edit(path, version=3), "has format 3; this version of lightning-caq reads up to 2"),
        (lambda path: _edit(path, layers=_reshaped(path)), "damaged: ValueError .* codes of .* bits take"),
        (lambda path: _edit(path, layers=[{"name": "0"}]), "damaged: KeyError 'bits'"),
        (lambda path: _edit(path, layers=None), "damaged: TypeError"),
        (lambda path: _edit(path, sizes={}), "damaged: KeyError 'weights'"),
    ],
)
def test_damaged_files(done, tmp_path, damage, match):
    path = done[2].save(tmp_path / "plan")
    damage(path)
    with pytest.raises(PlanError, match=match):
        QuantizationPlan.load(path)


def test_files_of_different_plans(done, tmp_path):
    net, _, plan = done
    first = plan.save(tmp_path / "first")
    other = quantize(copy.deepcopy(net), [X], avg_bits=4, method="uniform", compare=()).plan.save(tmp_path / "second")
    other.with_suffix(".safetensors").replace(first.with_suffix(".safetensors"))
    with pytest.raises(PlanError, match="do not belong together"):
        QuantizationPlan.load(first)


@every("state", [{}, {"version": "1"}, {"version": 99}, {"version": 1}])
def test_damaged_checkpoints(state):
    with pytest.raises(PlanError, match="in the checkpoint"):
        QuantizationPlan.from_state_dict(state)


def test_fingerprints():
    w = torch.randn(4, 6)
    same = fingerprint({"a": w, "b": w[:2]})
    assert fingerprint({"b": w[:2].clone(), "a": w.double()}) == same
    assert fingerprint({"a": w.T.contiguous().T, "b": w[:2]}) == same  # memory layout does not matter
    changed = w.clone()
    changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))
    for other in ({"a": changed, "b": w[:2]}, {"a": w, "c": w[:2]}, {"a": w.reshape(6, 4), "b": w[:2]}, {"a": w}):
        assert fingerprint(other) != same


@pytest.fixture(scope="module")
def rounded(done):
    """The float network, and its plan with the inputs of the last two layers rounded."""
    net, _, plan = done
    grids = {"4": InputGrid(4, 0.1, 0), "10": InputGrid(8, 0.02, 100)}
    layers = tuple(replace(layer, input_grid=grids.get(layer.name)) for layer in plan.layers)
    return net, replace(plan, layers=layers)


def _outputs(net, plan):
    """What a plain network gives whose inputs are rounded by hand."""
    values = []
    for name, module in net.named_children():
        grid = next((layer.input_grid for layer in plan.layers if layer.name == name), None)
        values.append(module if grid is None else nn.Sequential(Rounded(grid), module))
    return nn.Sequential(*values).eval()(X)


class Rounded(nn.Module):
    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, x):
        low = -self.grid.zero_point
        return (x / self.grid.scale).round().clamp(low, low + 2**self.grid.bits - 1) * self.grid.scale


def test_input_grids_are_saved_loaded_and_applied(rounded, tmp_path):
    net, plan = rounded
    assert plan.activation_bits == {"4": 4, "10": 8}
    assert plan.input_grids() == {"4": InputGrid(4, 0.1, 0), "10": InputGrid(8, 0.02, 100)}
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    file.seek(0)
    loaded = [
        QuantizationPlan.load(plan.save(tmp_path / "plan.json")),
        QuantizationPlan.from_state_dict(torch.load(file, weights_only=True)),
        plan.cpu(),
    ]
    for other in (plan, *loaded):
        assert [layer.input_grid for layer in other.layers] == [layer.input_grid for layer in plan.layers]
        model = copy.deepcopy(net)
        other.apply(model)
        plain = copy.deepcopy(model)
        restore_modules(plain)
        with torch.no_grad():
            torch.testing.assert_close(model(X), _outputs(plain, plan))
            assert not torch.equal(model(X), plain(X))


def test_attaching_and_settling_keep_input_grids(rounded):
    net, plan = rounded
    model = copy.deepcopy(net)
    plan.apply(model)
    y = model(X)
    restore_modules(model)
    assert plan.attach(model)
    assert torch.equal(model(X), y)
    assert plan.settled(model).input_grids() == plan.input_grids()


def test_a_plan_without_input_grids_and_one_of_before_there_were_any(done):
    net, quantized, plan = done
    assert (plan.activation_bits, plan.input_grids()) == ({}, {})
    state = plan.state_dict()
    for layer in state["layers"]:
        assert layer.pop("input") is None
    model = copy.deepcopy(net)
    QuantizationPlan.from_state_dict(state).apply(model)
    assert torch.equal(model(X), quantized(X))


@every("wrong", [{"bits": 4}, {"bits": 4, "scale": -1.0, "zero_point": 0}, {"bits": 4, "scale": "a"}])
def test_damaged_input_grids(rounded, wrong):
    state = rounded[1].state_dict()
    state["layers"][1]["input"] = wrong
    with pytest.raises(PlanError, match="in the checkpoint is damaged"):
        QuantizationPlan.from_state_dict(state)


def test_printed_it_is_one_line_a_layer_and_no_tensors(done):
    plan = done[2]
    lines = repr(plan).splitlines()
    assert lines[0].startswith("QuantizationPlan(uniform with avg_bits=2.5: ")
    assert lines[1:] == [f"  {name}: {bits:g} bits" for name, bits in plan.bits.items()]
