"""Entropy-coded networks, all the way: budgets, files, training on, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_caq import quantize
from lightning_caq.errors import BudgetError, LayerError, OptionError, PlanError
from lightning_caq.export.packed import load_quantized, save_quantized
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.report import QuantizationReport


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 40),
    ).eval()


def images(count: int = 48) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


QUICK = {"coding": "entropy", "method": "uniform", "guard": False, "compare": (), "curvature_samples": 8}


def test_bytes_are_those_of_the_budget_and_of_the_file(tmp_path: Path) -> None:
    weights = sum(p.numel() for p in network().parameters() if p.ndim > 1)
    sizes = []
    for budget in ({"avg_bits": 1.7}, {"ratio": 12.0}, {"max_bytes": 5200}):
        net = network()
        plan = quantize(net, [images()], **QUICK, **budget).plan
        size = save_quantized(net, tmp_path / "net.safetensors").stat().st_size
        sizes.append((plan.avg_bits, plan.ratio, size))
        assert plan.ratio == pytest.approx(4 * weights / plan.bytes)
        assert plan.bytes < size
    assert 1.65 < sizes[0][0] <= 1.7
    assert 12.0 <= sizes[1][1] < 12.4
    assert 5150 < sizes[2][2] <= 5200


def test_a_file_may_be_far_smaller_than_its_budget(tmp_path: Path) -> None:
    net = network()
    plan = quantize(net, [images()], **QUICK, max_bytes=10_000_000).plan
    assert 12 < plan.avg_bits <= 16
    assert save_quantized(net, tmp_path / "net.safetensors").stat().st_size < 10_000_000


def test_the_file_gives_the_network_back_to_the_bit(tmp_path: Path) -> None:
    net, fresh = network(), network()
    quantize(net, [images()], **QUICK, avg_bits=2)
    path = save_quantized(net, tmp_path / "net.safetensors")
    assert torch.equal(load_quantized(fresh, path)(images()), net(images()))
    untouched = network()
    before = copy.deepcopy(untouched.state_dict())
    with pytest.raises(LayerError, match="packed=False"):
        load_quantized(untouched, path, packed=True)
    payload = path.read_bytes()
    for place in range(0, len(payload), 37):
        path.write_bytes(payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :])
        with pytest.raises(PlanError):
            load_quantized(untouched, path)
    assert all(torch.equal(x, before[name]) for name, x in untouched.state_dict().items())


def test_plans_are_saved_and_applied(tmp_path: Path) -> None:
    net, fresh = network(), network()
    plan = quantize(net, [images()], **QUICK, avg_bits=2).plan
    loaded = QuantizationPlan.load(plan.save(tmp_path / "plan"))
    assert (loaded.avg_bits, loaded.ratio, loaded.bytes) == (plan.avg_bits, plan.ratio, plan.bytes)
    loaded.apply(fresh)
    assert torch.equal(fresh(images()), net(images()))


def test_training_on_moves_codes_and_keeps_steps() -> None:
    net = network()
    plan = quantize(net, [images()], **QUICK, avg_bits=2).plan
    optimizer = torch.optim.SGD(net.parameters(), 0.02)
    for _ in range(3):
        net(images()).square().sum().backward()
        optimizer.step()
    settled = plan.settled(net)
    for before, after in zip(plan.layers, settled.layers, strict=True):
        assert isinstance(before.grid, SteppedGrid)
        assert isinstance(after.grid, SteppedGrid)
        assert torch.equal(before.grid.step, after.grid.step)
    assert not torch.equal(settled.layers[-1].codes, plan.layers[-1].codes)
    assert settled.attach(net)
    assert settled.avg_bits > 0


def test_a_method_is_no_worse_than_equal_steps_on_layers_that_differ() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        net[0].weight.mul_(20)  # an error there counts as much as before, a step of the same size does not
        net[2].weight.mul_(0.05)
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(2))
    errors = {}
    for method in ("uniform", "caq"):
        made = copy.deepcopy(net)
        quantize(made, [x], **{**QUICK, "method": method, "curvature_samples": 32}, avg_bits=2)
        with torch.no_grad():
            errors[method] = float((made(x) - net(x)).square().mean())
    assert errors["caq"] < 0.9 * errors["uniform"]


def test_what_has_no_meaning_without_widths_is_refused_before_any_work() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    for options, words in (
        ({"study": True}, "study=True"),
        ({"granularity": "channel_group", "method": "cet"}, "granularity"),
        ({"quantizer": "codebook"}, "quantizer"),
        ({"rounding": "long_axis"}, "long_axis"),
        ({"method": "evolution"}, "table of costs"),
    ):
        with pytest.raises(OptionError, match=words):
            quantize(net, [images()], **{**QUICK, **options}, avg_bits=2)
    with pytest.raises(OptionError, match="coding='entropy'"):
        quantize(net, [images()], max_bytes=5000)
    with pytest.raises(BudgetError, match="cannot be met"):
        quantize(net, [images()], **QUICK, ratio=4000)
    with pytest.raises(BudgetError, match="small"):
        quantize(net, [images()], **QUICK, max_bytes=400)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_the_report_says_how_far_from_the_limit_the_codes_are() -> None:
    net = network()
    report = quantize(net, [images()], **QUICK, avg_bits=2.5).report
    limit = report.rate_limit
    assert limit is not None
    assert [x.name for x in limit.layers] == ["0", "3", "5", "9"]
    assert limit.bits == pytest.approx(report.sizes["quantized"].avg_bits)
    assert 0 < limit.gap < 1
    assert any("Shannon" in note for note in report.notes)
    assert QuantizationReport.from_json(report.to_json()) == report


def test_the_report_holds_the_networks_that_were_tried_and_survives_its_file() -> None:
    result = quantize(network(), [images()], **QUICK, avg_bits=1.7)
    limit = result.report.rate_limit
    assert limit is not None
    assert len(limit.tried) > 1
    kept = min(limit.tried, key=lambda point: abs(point.bits - result.plan.avg_bits))
    assert kept.bits == pytest.approx(result.plan.avg_bits)
    assert kept.output_error > 0
    assert QuantizationReport.from_json(result.report.to_json()).rate_limit == limit
