"""Networks whose channels differ in their bits, from options to files."""

import copy
import io

import nets
import pytest
import torch
from torch import nn

from lightning_caq import QuantizationPlan, load_quantized, quantize, save_quantized
from lightning_caq.export.integers import to_integers
from lightning_caq.export.sealed import read_sealed
from lightning_caq.quantizers.fake_quant.modules import quantized_weight
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.gallery import draw_gallery
from lightning_caq.sizes import code_bytes, width_bits

OPTIONS = {"calibration_samples": 64, "curvature_samples": 24, "guard": False, "compare": ("uniform",)}
X = nets.images(16, 3)[0]


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=60).eval()


@pytest.fixture(scope="module", params=["nearest", "error_feedback"])
def done(request, trained):
    """A quantized network and what came with it."""
    net = copy.deepcopy(trained)
    return quantize(
        net, [nets.images(64, 1)[0]], avg_bits=2.6, rounding=request.param, granularity="channel_group", **OPTIONS
    )


def test_the_budget_is_kept_and_sizes_are_those_of_the_codes(done):
    plan = done.plan
    mixed = {name: w for name, w in plan.widths.items() if not isinstance(w, int)}
    assert mixed  # else the rest says nothing
    payload = 0
    for layer in plan.layers:
        width = layer.grid.width
        each = [width] * layer.grid.scale.numel() if isinstance(width, int) else width
        rows = layer.codes.movedim(next(d for d, s in enumerate(layer.grid.scale.shape) if s > 1), 0)
        for row, b in zip(rows, each, strict=True):
            assert int(row.max()) < 2**b
            payload += b * row.numel()
    total = sum(plan.sizes.weights)
    assert plan.avg_bits == payload / total <= 2.6
    overhead = 48 * sum(plan.sizes.channels) + sum(width_bits(w) for w in mixed.values())
    assert plan.ratio == pytest.approx(32 * total / (payload + overhead), rel=1e-12)
    codes = sum(code_bytes(w, n) for w, n in zip(plan.widths.values(), plan.sizes.weights, strict=True))
    assert plan.bytes == codes + overhead // 8
    for name, width in mixed.items():
        assert plan.bits[name] == pytest.approx(sum(width) / len(width))


def test_the_network_computes_with_the_values_of_the_plan(done):
    for name, module in quantized_modules(done.model).items():
        layer = next(x for x in done.plan.layers if x.name == name)
        assert torch.equal(quantized_weight(module), layer.values)


def test_more_freedom_predicts_less_damage_than_whole_layers(done, trained):
    layered = quantize(copy.deepcopy(trained), [nets.images(64, 1)[0]], avg_bits=2.6, **OPTIONS)
    assert all(isinstance(b, int) for b in layered.plan.bits.values())
    assert done.report.predicted_loss["quantized"] < layered.report.predicted_loss["quantized"]


def test_plans_survive_files_and_checkpoints(done, trained, tmp_path):
    for plan in (
        QuantizationPlan.load(done.plan.save(tmp_path / "plan")),
        QuantizationPlan.from_state_dict(_saved(done.plan.state_dict())),
    ):
        assert (plan.widths, plan.bytes, plan.ratio) == (done.plan.widths, done.plan.bytes, done.plan.ratio)
        net = copy.deepcopy(trained)
        plan.apply(net)
        assert torch.equal(net(X), done.model(X))
    assert done.plan.cpu().widths == done.plan.widths
    plain = copy.deepcopy(trained)
    plain.load_state_dict(done.model.state_dict())
    assert done.plan.attach(plain)
    assert torch.equal(plain(X), done.model(X))


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_settling_keeps_every_channel_within_its_bits(done):
    net = copy.deepcopy(done.model)
    with torch.no_grad():
        for module in quantized_modules(net).values():
            module.weight += 10 * rounding_state(module).grid.scale
    settled = done.plan.settled(net)
    assert settled.widths == done.plan.widths
    for layer in settled.layers:
        assert bool((layer.codes <= layer.grid.top).all())


@pytest.mark.parametrize("packed", [False, True])
def test_packed_files_have_the_bytes_that_were_counted(done, trained, packed, tmp_path):
    path = save_quantized(done.model, tmp_path / "net.safetensors")
    net = load_quantized(copy.deepcopy(trained), path, packed=packed)
    assert torch.equal(net(X), done.model(X))
    others = sum(x.nbytes for name, x in trained.state_dict().items() if name not in _weights(done.plan))
    _, stored = read_sealed(path)
    assert sum(x.nbytes for x in stored.values()) == done.plan.bytes + others
    again = load_quantized(copy.deepcopy(trained), path)
    assert torch.equal(again(X), done.model(X))
    if packed:
        assert torch.equal(copy.deepcopy(net)(X), net(X))


def _weights(plan):
    return {f"{layer.name}.weight" for layer in plan.layers}


def test_integers_hold_every_channel(done):
    for module in quantized_modules(done.model).values():
        weight = quantized_weight(module).detach()
        stored = to_integers(weight, rounding_state(module).grid)
        shape = [-1 if d == stored.axis else 1 for d in range(weight.ndim)]
        scale, zero = (x.reshape(shape) for x in (stored.scale, stored.zero_point))
        assert torch.equal((stored.values - zero) * scale, weight)


def test_reports_and_figures_show_averages(done):
    report = QuantizationReport.from_json(done.report.to_json())
    assert report == done.report
    name, bits = next((n, b) for n, b in done.plan.bits.items() if isinstance(b, float))
    line = next(line for line in report.table().splitlines() if line.startswith(name))
    assert f"{bits:.3g}" in line.split()
    gallery = draw_gallery(report, done.profile)
    assert "bits" in gallery.figures
    drawn = gallery.figures["bits"].axes[0].images[0].get_array()
    row = [x.name for x in report.layers].index(name)
    assert drawn[row][0] == bits
    assert report.tightness is not None
    assert 0.5 < report.tightness.ratios["linear"] < 2


def test_whole_layers_are_as_they_were(trained):
    """The default granularity writes what it always wrote: no width of a channel anywhere."""
    plan = quantize(copy.deepcopy(trained), [nets.images(64, 1)[0]], avg_bits=2.6, **OPTIONS).plan
    assert not any(key.startswith("channel_bits/") for key in plan.state_dict()["tensors"])
    assert plan.sizes.widths == 0
    assert all(layer.grid.channel_bits is None for layer in plan.layers)


def test_embeddings_and_transposed_convolutions(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(32, 6), nn.Linear(6, 10))
    tokens = torch.randint(0, 32, (48, 5))
    result = quantize(copy.deepcopy(net), [tokens], avg_bits=3, granularity="channel_group", **OPTIONS)
    assert isinstance(result.plan.widths["0"], tuple)
    path = save_quantized(result.model, tmp_path / "words.safetensors")
    assert torch.equal(load_quantized(net, path)(tokens), result.model(tokens))
    up = nn.ConvTranspose2d(3, 16, 2, groups=1)
    deconv = nn.Sequential(up, nn.ReLU(), nn.AvgPool2d(5), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(48, 3, 4, 4)
    result = quantize(deconv, [x], avg_bits=3, granularity="channel_group", **OPTIONS)
    assert result.plan.avg_bits <= 3
