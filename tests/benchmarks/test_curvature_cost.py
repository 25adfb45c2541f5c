from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["hvp_per_gradient", "layer_hvps_per_gradient", "lanczos_products", "gram_gradients"]
KEYS += ["eigenvalue_relative_error", "mb_per_sample", "kappa_lipschitz_seconds", "peers"]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(4 * 15 * 15, 10)).eval()


def test_report_of_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import curvature as benchmark

    monkeypatch.setattr(benchmark.peers, "installed", list)
    sizes = benchmark.Sizes(
        batches=(4, 2), samples=8, gram_samples=8, eigenpairs=(10, 20), rounds=1, network=(20, 8, 4), kappa_samples=16
    )
    report = benchmark.benchmark(small_network(), torch.randn(8, 3, 32, 32), sizes)
    figures = report.figures
    assert list(vars(figures)) == KEYS
    # The errors are against float64; a product costs no less than walking two graphs.
    assert figures.eigenvalue_relative_error < 1e-4
    assert set(figures.lanczos_products) == {"10", "20"}
    assert 10 <= figures.lanczos_products["10"] <= figures.lanczos_products["20"] <= 72  # the rank of H
    assert figures.hvp_per_gradient > 0
    assert figures.layer_hvps_per_gradient > 0
    assert figures.gram_gradients > 0
    # The first layer's output alone takes 4 · 15 · 15 float32 numbers a sample.
    assert 4 * 4 * 15 * 15 < 1e6 * figures.mb_per_sample < 1e6
    assert 0 < figures.kappa_lipschitz_seconds < 5
    assert figures.peers == {}
    axes = [row[0] for row in report.growth]
    assert [axes.count(axis) for axis in ("batches", "layers", "parameters", "k")] == [3, 3, 3, 2]
    text = benchmark.as_text(report, sizes, 12.0)
    for words in (
        "measure",
        "ours",
        "limit",
        "peers",
        "torch " + torch.__version__,
        "cores",
        "12 s",
        "those over the 8",
    ):
        assert words in text


def test_json_has_exactly_the_agreed_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import curvature as benchmark
    from networks import Images

    torch.manual_seed(1)
    images = Images(torch.randn(12, 3, 32, 32), torch.zeros(12, dtype=torch.long))
    monkeypatch.setattr(benchmark, "load_cifar10", lambda data: (images, images))
    monkeypatch.setattr(benchmark, "load_network", lambda name, data: small_network())
    monkeypatch.setattr(benchmark.peers, "installed", list)
    tiny = ["--batches", "4", "2", "--samples", "6", "--gram-samples", "12", "--eigenpairs", "2", "1", "--rounds", "1"]
    benchmark.main([*tiny, "--json"])
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert list(figures) == KEYS
    assert list(figures["lanczos_products"]) == ["1", "2"]
    assert "Gram" in said.err


def test_missing_data_is_said_in_one_sentence(tmp_path: Path) -> None:
    import curvature as benchmark

    with pytest.raises(SystemExit) as told:
        benchmark.main(["--data", str(tmp_path / "nowhere")])
    assert isinstance(told.value.code, str)  # printed to stderr, with exit status 1
    assert "\n" not in told.value.code
    assert "does not exist" in told.value.code
    assert "--data" in told.value.code


def test_reference_agrees_with_the_hessian_that_torch_makes() -> None:
    import reference

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    x = torch.randn(6, 3, dtype=torch.float64)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    flat = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    targets = net(x).softmax(1).detach()

    def loss(vector: torch.Tensor) -> torch.Tensor:
        weights = {"0.weight": vector[:12].reshape(4, 3), "2.weight": vector[12:].reshape(3, 4)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, weights, (x,)), targets)

    dense = torch.autograd.functional.hessian(loss, flat)
    truth = reference.Reference(net, x)
    v = torch.randn(24, dtype=torch.float64)
    assert torch.allclose(truth.product(v), dense @ v)
    expected = torch.linalg.eigvalsh(dense).flip(0)[:10]
    assert torch.allclose(truth.eigenvalues()[:10], expected)


def test_ratio_is_taken_round_by_round() -> None:
    import stopwatch

    # The third round was slow for both: their ratio in it is that of the others.
    times = {"gradient": [1.0, 1.0, 10.0], "product": [2.0, 2.2, 20.0]}
    assert stopwatch.ratios(times, "gradient")["product"] == 2.0


def test_recorded_run_takes_over_what_a_longer_one_did() -> None:
    import curvature as benchmark

    matrix = torch.diag(torch.arange(1.0, 41.0))
    calls = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return matrix @ v

    recorded = benchmark.Recorded(product)
    start = torch.ones(40)
    long = recorded.run(start, 10, 1e-3)
    spent = calls
    short = recorded.run(start, 2, 1e-3)
    assert long.products == spent == calls
    assert short.products < long.products
    assert torch.allclose(short.values, torch.tensor([40.0, 39.0], dtype=torch.float64), rtol=1e-4)
