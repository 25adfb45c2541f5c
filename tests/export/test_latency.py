"""Times of networks in ONNX Runtime."""

import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import ExportError
from lightning_caq.export.latency import Latency, benchmark, by_turns
from lightning_caq.export.onnx import export_onnx
from lightning_caq.export.onnx_inputs import read_example

pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def _net(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), torch.randn(64, 20)
    quantize(net, [x], avg_bits=8, method="uniform", rounding="nearest", compare=(), guard=False, activation_bits=8)
    return net, export_onnx(net, tmp_path / "net.onnx", x).path


def test_a_network_is_timed_in_float32_and_as_exported(tmp_path):
    net, path = _net(tmp_path)
    before = {key: x.clone() for key, x in net.state_dict().items()}
    outputs = net(torch.ones(1, 20))
    times = benchmark(net, path, torch.randn(3, 20), threads=1, runs=5)
    assert (times.batch, times.threads, times.runs) == (3, 1, 5)
    assert times.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert min(times.float_ms, times.quantized_ms, times.speedup) > 0
    assert f"{times.speedup:.2f} times" in str(times)
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
    assert torch.equal(net(torch.ones(1, 20)), outputs)


def test_refusals(tmp_path):
    net, path = _net(tmp_path)
    x = torch.randn(3, 20)
    for words, arguments in (
        ("no file", {"path": tmp_path / "other.onnx"}),
        ("threads=0", {"path": path, "threads": 0}),
        ("runs=0", {"path": path, "runs": 0}),
    ):
        with pytest.raises(ExportError, match=words):
            benchmark(net, arguments.pop("path"), x, **arguments)


def test_sessions_run_by_turns():
    order = []

    class Session:
        def __init__(self, name):
            self.name = name

        def get_inputs(self):
            return []

        def run(self, names, feed):
            order.append(self.name)

    times = by_turns({"a": Session("a"), "b": Session("b")}, read_example(nn.Identity(), torch.zeros(1)), runs=3)
    assert order == ["a", "b"] * 5  # two that do not count
    assert {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3}


def test_the_speedup_is_that_of_runs_side_by_side():
    from lightning_caq.export.latency import ratio

    assert ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert "2 threads" in str(Latency("r", 1, 2, float_ms=1.0, quantized_ms=1.0, speedup=1.0, runs=1))
