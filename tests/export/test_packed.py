"""Packed files: the outputs of the network that was saved, in the bytes that were counted, or a refusal."""

import copy
import io
from itertools import pairwise
from pathlib import Path

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import LayerError, OptionError, PlanError
from lightning_caq.export.packed import load_quantized, save_quantized
from lightning_caq.export.sealed import read_sealed, write_sealed
from lightning_caq.network.layers import quantizable_layers
from lightning_caq.quantizers.fake_quant.state import PREFIX, rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, swap
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid, fit_grid

X = nets.images(16, 3)[0]


def _quantized(net, batch, **options):
    """The plan of a network that is quantized quickly, in eval mode."""
    options = {"avg_bits": 3, "method": "uniform", "rounding": "nearest", "compare": (), **options}
    plan = quantize(net, [batch], **options).plan
    net.eval()
    return plan


def _swapped(net, bits):
    """The network with the layers' weights on grids of their own, without calibration."""
    grids = {
        name: fit_grid(net.get_submodule(name).weight, bits, layer.channel_shape)
        for layer in quantizable_layers(net)
        for name in layer.modules
    }
    with torch.no_grad():
        for name, grid in grids.items():
            weight = net.get_submodule(name).weight
            weight.copy_(grid.nearest(weight))
    swap(net, grids)
    return net.eval()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A float network, the quantized one with repaired tensors, its plan and its file."""
    torch.manual_seed(0)
    net = nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=40).eval()
    quantized = copy.deepcopy(net)
    plan = _quantized(quantized, nets.images(128, 1)[0], avg_bits=2)
    assert {"1.running_mean", "10.bias"} <= set(plan.repairs)
    return net, quantized, plan, save_quantized(quantized, tmp_path_factory.mktemp("f") / "net.safetensors")


def _same_state(a, b):
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(v, other[k]) for k, v in state.items())


def _tensors(path):
    return read_sealed(path)[1]


def _stored_bytes(tensors):
    ends = (".codes", ".scale", ".doubled_zero_point")
    return sum(x.numel() * x.element_size() for name, x in tensors.items() if name.endswith(ends))


def test_a_fresh_network_becomes_the_one_that_was_saved(done):
    _, quantized, _, path = done
    other = nets.small_cnn().eval()
    assert load_quantized(other, path) is other
    _same_state(other, quantized)
    assert torch.equal(other(X), quantized(X))
    assert {n: (rounding_state(m).bits, type(m)) for n, m in quantized_modules(other).items()} == {
        n: (rounding_state(m).bits, type(m)) for n, m in quantized_modules(quantized).items()
    }
    again = save_quantized(other, path.with_name("again"))
    assert again.read_bytes() == path.read_bytes()


def test_into_a_network_that_is_quantized_otherwise(done):
    _, quantized, _, path = done
    other = _swapped(nets.small_cnn(), 5)
    load_quantized(other, path)
    assert torch.equal(other(X), quantized(X))


def test_a_layer_left_in_float_stays_so(done, tmp_path):
    net = copy.deepcopy(done[0])
    _quantized(net, X, exclude=["4"], avg_bits=4)
    other = _swapped(nets.small_cnn(), 3)
    load_quantized(other, save_quantized(net, tmp_path / "f"))
    assert type(other[4]) is nn.Conv2d
    assert torch.equal(other(X), net(X))


@every("bits", range(1, 9))
@every("name", ["mlp", "cnn", "pixels", "tied", "twice", "dict"])
def test_round_trips_of_every_width(name, bits, tmp_path):
    case = nets.make_case(name)
    net, batch = _swapped(case.net, bits), case.batches[0]
    path = save_quantized(net, tmp_path / "f")
    for packed in (False, True):
        other = load_quantized(nets.make_case(name).net, path, packed=packed)
        assert torch.equal(case.output(other, batch), case.output(net, batch))


@every("name", nets.CONVOLUTIONS)
def test_convolutions_of_every_kind(name, tmp_path):
    make, shape = nets.CONVOLUTIONS[name]
    net, x = _swapped(nn.Sequential(make()), 3), torch.randn(2, *shape)
    path = save_quantized(net, tmp_path / "f")
    for packed in (False, True):
        assert torch.equal(load_quantized(nn.Sequential(make()), path, packed=packed)(x), net(x))


@every("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_point_types(dtype, tmp_path):
    net, x = _swapped(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(dtype), 3), torch.randn(5, 6, dtype=dtype)
    path = save_quantized(net, tmp_path / "f")
    for packed in (False, True):
        other = load_quantized(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(dtype), path, packed=packed)
        assert torch.equal(other(x), net(x))
    with pytest.raises(PlanError, match=f"as {dtype}.* as torch.float32.*in its floating-point type"):
        load_quantized(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), path)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    net = _swapped(nets.Words(), 3)
    path = save_quantized(net, tmp_path / "f")
    assert sorted(_tensors(path)) == sorted(
        [f"{key}.{part}" for key in ("table.weight", "mix.weight") for part in ("codes", "scale", "doubled_zero_point")]
        + ["mix.bias"]
    )
    other = load_quantized(nets.Words(), path)
    assert other.out.weight is other.table.weight
    packed = load_quantized(nets.Words(), path, packed=True)
    assert packed.out._lightning_caq_codes is packed.table._lightning_caq_codes
    apart = nets.Words()
    apart.out.weight = nn.Parameter(apart.table.weight.detach().clone())
    _refused(apart, path, "other tensors are tied in it than in Words")
    path = save_quantized(_swapped(apart, 3), tmp_path / "f")
    _refused(nets.Words(), path, "other tensors are tied in it than in Words")


def test_a_network_of_one_layer(tmp_path):
    net, x = _swapped(nn.Linear(6, 5), 3), torch.randn(4, 6)
    path = save_quantized(net, tmp_path / "f")
    assert torch.equal(load_quantized(nn.Linear(6, 5), path)(x), net(x))
    assert torch.equal(load_quantized(nn.Linear(6, 5), path, packed=True)(x), net(x))


def test_the_files_bytes_are_those_that_the_plan_counts(done, tmp_path):
    _, _, plan, path = done
    assert _stored_bytes(_tensors(path)) == plan.bytes
    for seed, shapes in enumerate([(5, 7, 3), (3, 3, 3), (1, 1, 1), (13, 11, 2)]):
        torch.manual_seed(seed)  # layers whose weights end inside a byte
        net = nn.Sequential(nn.Linear(*shapes[:2]), nn.Tanh(), nn.Linear(*shapes[1:]))
        plan = _quantized(net, torch.randn(32, shapes[0]), avg_bits=3)
        assert _stored_bytes(_tensors(save_quantized(net, tmp_path / "f"))) == plan.bytes


def test_packed_in_memory(done):
    _, quantized, plan, path = done
    other = load_quantized(nets.small_cnn().eval(), path, packed=True)
    assert torch.equal(other(X), quantized(X))
    held = {k.replace(PREFIX, ""): x for k, x in (*other.named_parameters(), *other.named_buffers())}
    assert _stored_bytes(held) == plan.bytes
    rest = {name for name in held if name.rsplit(".", 1)[1] not in ("codes", "scale", "doubled_zero_point")}
    assert rest == quantized.state_dict().keys() - {f"{layer.name}.weight" for layer in plan.layers}
    assert sum(x.numel() for x in other[4]._parameters.values() if x is not None) == 8  # the bias alone
    assert torch.equal(other[4].weight, quantized[4].weight)


def test_copies_and_states_of_a_packed_network(done):
    other = load_quantized(nets.small_cnn().eval(), done[3], packed=True)
    expected = other(X)
    assert torch.equal(copy.deepcopy(other)(X), expected)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), expected)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    other[4]._lightning_caq_codes.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(X), expected)


def test_a_packed_network_takes_the_keys_of_earlier_versions(done):
    source, other = (load_quantized(nets.small_cnn().eval(), done[3], packed=True) for _ in range(2))
    earlier = {key.replace(PREFIX, ""): x for key, x in source.state_dict().items()}
    other[4]._lightning_caq_codes.zero_()
    other.load_state_dict(earlier)
    assert torch.equal(other(X), source(X))


def test_a_packed_network_cannot_be_saved_or_filled_again(done, tmp_path):
    other = load_quantized(nets.small_cnn().eval(), done[3], packed=True)
    with pytest.raises(LayerError, match="loaded with packed=True"):
        save_quantized(other, tmp_path / "f")
    with pytest.raises(PlanError, match=r"it has '0.weight', '10.weight', '4.weight', which Sequential lacks"):
        load_quantized(other, done[3])


def test_networks_that_cannot_be_saved(done, tmp_path):
    net, quantized, _, _ = done
    with pytest.raises(LayerError, match="Sequential has no quantized layer; run quantize"):
        save_quantized(net, tmp_path / "f")
    moved = copy.deepcopy(quantized)
    with torch.no_grad():
        moved[4].weight += 0.01
    with pytest.raises(LayerError, match=r"Layer '4' holds weights that are not on its grid.*plan.settled"):
        save_quantized(moved, tmp_path / "f")
    with pytest.warns(UserWarning, match="do not lie on its grids"):
        moved.load_state_dict(net.state_dict())
    with pytest.raises(LayerError, match="not on its grid"):
        save_quantized(moved, tmp_path / "f")
    odd = copy.deepcopy(quantized)
    rounding_state(odd[4]).calibrated.zero_point.add_(0.25)
    with torch.no_grad():
        odd[4].weight.copy_(rounding_state(odd[4]).grid.nearest(odd[4].weight))
    with pytest.raises(LayerError, match="multiple of one half"):
        save_quantized(odd, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    net = nn.Sequential(Odd(3, 3))
    swap(net, {"0": Grid(2, torch.ones(3, 1), torch.zeros(3, 1))})
    with torch.no_grad():
        net[0].weight.zero_()
    with pytest.raises(LayerError, match=r"'0._extra_state': a dict"):
        save_quantized(net, tmp_path / "f")


def _refused(net, path, match):
    state, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    for packed in (False, True):
        with pytest.raises(PlanError, match=match):
            load_quantized(net, path, packed=packed)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [type(m) for m in net.modules()] == classes


@every(
    ("change", "match"),
    [
        (lambda net: net.__setitem__(10, nn.Linear(32, 5)), r"'10.weight' as torch.float32 \[4, 32\].*\[5, 32\]"),
        (lambda net: net.__delitem__(10), "it has '10.bias', '10.weight', which Sequential lacks"),
        (lambda net: net.append(nn.Linear(4, 4)), "it lacks '11.bias', '11.weight', which Sequential has"),
        (lambda net: net.__setitem__(1, nn.Identity()), "'1.running_mean' and 2 more, which Sequential lacks"),
        (lambda net: net.double(), "as torch.float64"),
    ],
)
def test_other_networks(done, change, match):
    other = nets.small_cnn()
    change(other)
    _refused(other, done[3], f"belongs to another network.*{match}")
    _refused(_swapped(nets.relu_mlp(), 3), done[3], "belongs to another network")


def test_other_kinds_of_layers(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

    path = save_quantized(_swapped(nn.Sequential(nn.Linear(3, 3, bias=False)), 2), tmp_path / "f")
    _refused(nn.Sequential(Own()), path, "'0' is a layer that can be quantized, in Sequential it is not")


def test_networks_without_values(done):
    with pytest.raises(PlanError, match=r"run one batch through its lazy layers"):
        load_quantized(nn.Sequential(nn.LazyLinear(3)), done[3])
    with pytest.raises(PlanError, match="to_empty"):
        load_quantized(nets.small_cnn().to("meta"), done[3])


def test_damaged_files(done, tmp_path):
    payload, path = bytearray(done[3].read_bytes()), tmp_path / "f"
    for place in range(3, len(payload), len(payload) // 40):
        changed = payload.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        _refused(nets.small_cnn(), path, "damaged|truncated|cannot be read|no file of|another")
    path.write_bytes(payload[:-1])
    _refused(nets.small_cnn(), path, "truncated")
    _refused(nets.small_cnn(), tmp_path / "none", "cannot be read")


def _without(name):
    return lambda description, tensors: tensors.pop(name)


@every(
    ("edit", "match"),
    [
        (_without("1.bias"), "it lacks '1.bias', which Sequential has"),
        (_without("4.weight.scale"), "damaged: KeyError '4.weight.scale'"),
        (lambda d, t: t.__setitem__("extra", torch.ones(2)), "it has 'extra', which Sequential lacks"),
        (lambda d, t: d.pop("layers"), "damaged: KeyError 'layers'"),
        (lambda d, t: d["layers"][0].pop("bits"), "damaged: TypeError"),
        (lambda d, t: d["layers"][0].__setitem__("bits", 8), "do not fit its shape"),
        (lambda d, t: t.__setitem__("4.weight.scale", torch.ones(5, 1, 1, 1)), "do not fit its shape"),
        (lambda d, t: t.__setitem__("4.weight.codes", t["4.weight.codes"].char()), "do not fit its shape"),
        (lambda d, t: d["layers"][0].__setitem__("modules", ["99"]), "'99' is a layer"),
    ],
)
def test_files_with_a_right_fingerprint_that_hold_something_else(done, tmp_path, edit, match):
    description, tensors = read_sealed(done[3])
    edit(description, tensors)
    _refused(nets.small_cnn(), write_sealed(tmp_path / "f", description, tensors), match)


def test_a_file_of_the_first_format(tmp_path):
    """Written by version 0.1.0 of the code, with the outputs that its network had then."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()
    load_quantized(net, Path(__file__).parent / "data" / "format_1.safetensors")
    x = torch.linspace(-1, 1, 12).reshape(2, 6)
    expected = [[-0.3903243839, -0.1194128394, -0.3042926788], [-0.4230895936, -0.0894879103, -0.2604683638]]
    torch.testing.assert_close(net(x), torch.tensor(expected))
    assert save_quantized(net, tmp_path / "f").stat().st_size < 1000  # in the present format, for 1,610


def test_torch_export_of_the_swapped_network(done):
    exported = torch.export.export(done[1], (X,)).module()
    torch.testing.assert_close(exported(X), done[1](X))
    codes = done[1][4].weight.detach().unique()
    assert len(codes) <= 8 * 2 ** rounding_state(done[1][4]).bits


def test_torch_export_of_a_packed_network(done):
    other = load_quantized(nets.small_cnn().eval(), done[3], packed=True)
    torch.testing.assert_close(torch.export.export(other, (X,)).module()(X), other(X))


def test_resnet20_in_a_thirteenth(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from networks import ResNet

    torch.manual_seed(0)
    net, x = ResNet(3), torch.randn(8, 3, 32, 32)
    net.train()(x)  # statistics of their own
    plan = _quantized(net, x, avg_bits=2.25, batchnorm="keep")
    path = save_quantized(net, tmp_path / "f")
    stored, statistics = _stored_bytes(_tensors(path)), 4 * sum(p.numel() for p in net.state_dict().values())
    floats = 4 * sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert stored == plan.bytes <= floats / 13
    assert path.stat().st_size - stored - (statistics - floats) < 2000  # the header, and counters of eight bytes
    assert torch.equal(load_quantized(ResNet(3).eval(), path, packed=True)(x), net(x))
    half = save_quantized(net, tmp_path / "half", other_dtype="float16")
    assert half.stat().st_size <= 1.1 * plan.bytes
    found = load_quantized(ResNet(3).eval(), half)(x)
    assert (found - net(x)).norm() < 2e-3 * net(x).norm()


def test_the_header_of_a_small_network_is_small(tmp_path):
    widths = [32, 64, 64, 64, 48, 48, 10]
    layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    net = _swapped(nn.Sequential(*layers), 4)
    path = save_quantized(net, tmp_path / "f")
    assert path.stat().st_size - sum(x.nbytes for x in _tensors(path).values()) < 1200  # of 54 tensors in 12 modules


def test_half_precision_is_for_statistics_and_biases_in_its_range(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 2))  # noqa: E731
    net = make()
    with torch.no_grad():
        net[1].running_mean.copy_(torch.tensor([0.1, -3.0, 0.0, 1e3, 7.7]))
        net[1].running_var.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 1e-7]))  # half precision has no such number
        net[2].bias.fill_(1e6)  # nor this
    grid = fit_grid(net[0].weight, 3, (5, 1))
    with torch.no_grad():
        net[0].weight.copy_(grid.nearest(net[0].weight))
    swap(net, {"0": grid})
    other = load_quantized(make(), save_quantized(net, tmp_path / "f", other_dtype="float16"))
    state, found = net.state_dict(), other.state_dict()
    rounded = {key for key, x in state.items() if not torch.equal(x, found[key])}
    assert rounded == {"0.bias", "1.running_mean", "3.bias"}
    assert all(torch.equal(found[key], state[key].half().float()) for key in rounded)
    assert all(found[key].dtype == x.dtype for key, x in state.items())
    again = save_quantized(other, tmp_path / "again", other_dtype="float16")  # nothing is lost a second time
    assert again.read_bytes() == (tmp_path / "f").read_bytes()
    with pytest.raises(OptionError, match=r"other_dtype='int8' is not known; give 'float16', or None"):
        save_quantized(net, tmp_path / "f", other_dtype="int8")


def _with_inputs(net, bits=3):
    """The network, swapped, the inputs of all its layers rounded."""
    _swapped(net, bits)
    grids, modules = (
        {name: rounding_state(m).grid for name, m in quantized_modules(net).items()},
        quantized_modules(net),
    )
    swap(net, grids, {name: InputGrid(4, 0.25, 3 + index) for index, name in enumerate(modules)})
    return net


@every("packed", [False, True])
@every("name", ["mlp", "cnn", "pixels", "tied", "twice", "dict"])
def test_inputs_are_rounded_as_in_the_network_that_was_saved(name, packed, tmp_path):
    case = nets.make_case(name)
    plain = case.output(_swapped(copy.deepcopy(case.net), 3), case.batches[0])
    net, batch = _with_inputs(case.net), case.batches[0]
    if name in ("tied", "twice"):  # one grid a layer: what shares a weight shares it
        swap(
            net,
            {k: rounding_state(m).grid for k, m in quantized_modules(net).items()},
            dict.fromkeys(_names(net), InputGrid(4, 0.25, 3)),
        )
    other = load_quantized(nets.make_case(name).net, save_quantized(net, tmp_path / "f"), packed=packed)
    assert torch.equal(case.output(other, batch), case.output(net, batch))
    assert not torch.equal(case.output(other, batch), plain)


def _names(net):
    return [name for layer in quantizable_layers(net) for name in layer.modules]


def test_loading_a_file_without_input_grids_takes_inputs_as_they_are(tmp_path):
    net = _swapped(nets.small_cnn(), 3)
    other = load_quantized(_with_inputs(nets.small_cnn()), save_quantized(net, tmp_path / "f"))
    assert all(rounding_state(module).input_grid is None for module in quantized_modules(other).values())
    assert torch.equal(other(X), net(X))


def test_a_damaged_input_grid(tmp_path):
    path = save_quantized(_with_inputs(nets.small_cnn()), tmp_path / "f")
    description, tensors = read_sealed(path)
    description["layers"][0]["input_grid"]["scale"] = 0.0
    with pytest.raises(PlanError, match="damaged: OptionError"):
        load_quantized(nets.small_cnn(), write_sealed(path, description, tensors))
