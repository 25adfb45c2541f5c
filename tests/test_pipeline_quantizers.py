"""Every quantizer down the whole road: options, rounding, modules, plan, packed file, ONNX."""

import copy
import io

import pytest
import torch
from every import every
from torch import nn

from lightning_caq import export_onnx, load_quantized, quantize, save_quantized
from lightning_caq.errors import ExportError, OptionError
from lightning_caq.export.packed_modules import Packed
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules
from lightning_caq.quantizers.grids.ranges import RANGES
from lightning_caq.sizes import CODEBOOKS


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5),
    ).eval()  # fmt: skip


def _batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(32, 2, 4, 4, generator=draw) for _ in range(5)]


def _quantized(**options):
    net = _net()
    arguments = {"method": "uniform", "avg_bits": 3, "bits": (2, 3, 4), "compare": (), "guard": False}
    return quantize(net, _batches(), **(arguments | options))


@pytest.fixture(scope="module", params=CODEBOOKS)
def done(request):
    return request.param, _quantized(quantizer=request.param)


def test_weights_lie_in_their_tables(done):
    quantizer, result = done
    assert {layer.grid.quantizer for layer in result.plan.layers} == {quantizer}
    assert result.plan.avg_bits <= 3
    for name, module in quantized_modules(result.model).items():
        table, bits = rounding_state(module).grid.table, result.plan.bits[name]
        assert table.shape[-1] == 2**bits
        axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
        for index, channel in enumerate(module.weight.detach().movedim(axis, 0)):
            own = table.reshape(-1, 2**bits)[index if table.numel() > 2**bits else 0]
            assert set(channel.flatten().tolist()) <= set(own.tolist())


def test_size_is_that_of_the_file(done, tmp_path):
    _, result = done
    path = save_quantized(result.model, tmp_path / "net")
    fresh, x = _net(), _batches()[0]
    expected = result.model(x)
    for packed in (False, True):
        loaded = load_quantized(copy.deepcopy(fresh), path, packed=packed)
        assert torch.equal(loaded(x), expected)
        stored = io.BytesIO()
        torch.save(copy.deepcopy(loaded), stored)
    size = sum(
        x.numel() * x.element_size()
        for module in loaded.modules()
        if isinstance(module, Packed)
        for x in module._buffers.values()
    )
    assert result.plan.bytes == size
    assert result.plan.ratio == pytest.approx(sum(result.plan.sizes.weights) * 4 / size, rel=1e-3)


def test_plans_survive(done, tmp_path):
    _, result = done
    plan = QuantizationPlan.load(result.plan.save(tmp_path / "plan.json"))
    again = QuantizationPlan.from_state_dict(copy.deepcopy(result.plan.state_dict()))
    for each in (plan, again):
        assert each.bytes == result.plan.bytes
        assert each.sizes == result.plan.sizes
        net = _net()
        each.apply(net)
        assert torch.equal(net(_batches()[0]), result.model(_batches()[0]))
    plain = _net()
    plain.load_state_dict(result.model.state_dict())
    assert plan.attach(plain)
    restore_modules(plain)
    assert type(plain[0]) is nn.Conv2d
    assert sorted(plain.state_dict()) == sorted(_net().state_dict())


def test_training_on_settles_in_the_same_tables(done):
    _, result = done
    net = copy.deepcopy(result.model).train()
    optimiser = torch.optim.SGD(net.parameters(), 2.0)
    for x in _batches():
        net(x).square().mean().backward()
    assert all(module.weight.grad.abs().sum() > 0 for module in quantized_modules(net).values())
    optimiser.step()
    settled = result.plan.settled(net)
    assert settled.bytes == result.plan.bytes
    assert not all(torch.equal(a.codes, b.codes) for a, b in zip(settled.layers, result.plan.layers, strict=True))
    for layer in settled.layers:
        assert torch.equal(net.get_submodule(layer.name).weight, layer.values)


def test_onnx_says_what_it_cannot_hold(done, tmp_path):
    quantizer, result = done
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match=f"'{quantizer}'.*quantizer='affine'"):
        export_onnx(result.model, tmp_path / "net.onnx", _batches()[0])


@every("range_", RANGES)
@every("rounding", ["nearest", "error_feedback"])
def test_ranges_go_the_whole_road(range_, rounding, tmp_path):
    result = _quantized(range=range_, rounding=rounding, symmetry="mid_rise" if range_ == "aciq" else "asymmetric")
    path = save_quantized(result.model, tmp_path / "net")
    assert torch.equal(load_quantized(_net(), path)(_batches()[0]), result.model(_batches()[0]))
    if range_ == "aciq":
        assert all(bool((x.grid.zero_point == (2**x.grid.bits - 1) / 2).all()) for x in result.plan.layers)


def test_curvature_lowers_the_output_error_of_nearest_rounding():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.01, 3, 64) ** 2
    errors = {}
    for range_ in ("mse", "curvature"):
        torch.manual_seed(0)
        net = nn.Linear(64, 16, bias=False)
        expected = net(x).detach()
        options = {"method": "uniform", "avg_bits": 2, "bits": (2,), "compare": (), "guard": False}
        quantize(net, [x], rounding="nearest", range=range_, batchnorm="keep", **options)
        errors[range_] = float((net(x) - expected).detach().square().mean())
    assert errors["curvature"] < errors["mse"]


@every(("quantizer", "ratio"), [("codebook", 6.5), ("lq_nets", 6.5), ("series", 9.0)])
def test_a_ratio_is_met(quantizer, ratio):
    result = _quantized(quantizer=quantizer, avg_bits=None, ratio=ratio, method="cet", bits=(1, 2, 3, 4))
    assert result.plan.ratio >= ratio


def test_bad_options():
    for name, value in (("quantizer", "kmeans"), ("range", "max"), ("symmetry", "even")):
        with pytest.raises(OptionError, match=f"{name}='{value}' is not known; choose from"):
            QuantizationOptions(avg_bits=3, **{name: value})
    for name, value in (("range", "aciq"), ("symmetry", "mid_rise"), ("granularity", "channel_group")):
        with pytest.raises(OptionError, match=f"{name}='{value}' is for quantizer='affine'"):
            QuantizationOptions(avg_bits=3, quantizer="lq_nets", **{name: value})


@every("quantizer", ["codebook", "abc_net"])
def test_embeddings_and_tied_weights(quantizer):
    torch.manual_seed(0)
    emb, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    out.weight = emb.weight
    net = nn.Sequential(emb, out)
    tokens = torch.randint(0, 12, (32, 3), generator=torch.Generator().manual_seed(0))
    options = {"method": "uniform", "avg_bits": 2, "bits": (2,), "compare": (), "guard": False}
    result = quantize(net, [tokens], quantizer=quantizer, **options)
    assert result.plan.layers[0].modules == ("0", "1")
    assert net[0].weight is net[1].weight
    assert len(net[0].weight.unique()) <= 4 * (12 if quantizer == "abc_net" else 1)
