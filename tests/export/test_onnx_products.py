"""Products of quantized weights: which operators onnxruntime makes of them, and how exact they are."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_caq import export_onnx, quantize

FAST = {"avg_bits": 4, "bits": (4,), "method": "uniform", "compare": (), "guard": False, "symmetry": "symmetric"}
LEVEL = "session.qdq_matmulnbits_accuracy_level"


def _net(group_size):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 5)).eval()
    quantize(net, [torch.randint(20, (16, 7))], group_size=group_size, **FAST)
    return net


def _run(path, tokens, tmp_path, **settings):
    """Outputs, and the operators that are left once onnxruntime has optimized the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"input": tokens.numpy()})[0])
    return found, [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("group_size", [None, 32])
def test_products_are_exact_in_a_session_with_defaults(group_size, tmp_path):
    net, tokens = _net(group_size), torch.randint(20, (3, 7))
    result = export_onnx(net, tmp_path / "net.onnx", torch.randint(20, (2, 7)))
    found, operators = _run(result.path, tokens, tmp_path)
    assert "MatMulNBits" not in operators
    assert torch.allclose(found, net(tokens).detach(), atol=1e-6, rtol=1e-5)
    assert result.default_difference < 1e-5
    assert not any(LEVEL in note for note in result.notes)
    assert not onnx.load(result.path).metadata_props


@pytest.mark.parametrize("group_size", [None, 32])
def test_fused_products_are_exact_where_the_session_is_told(group_size, tmp_path):
    net, tokens = _net(group_size), torch.randint(20, (3, 7))
    result = export_onnx(net, tmp_path / "net.onnx", tokens, fused=True)
    (setting,) = onnx.load(result.path).metadata_props
    assert (setting.key, setting.value) == (f"lightning_caq.{LEVEL}", "1")
    exact, operators = _run(result.path, tokens, tmp_path, **{LEVEL: "1"})
    assert operators.count("MatMulNBits") == 2
    expected = net(tokens).detach()
    assert torch.allclose(exact, expected, atol=1e-6, rtol=1e-5)
    default, operators = _run(result.path, tokens, tmp_path)
    assert operators.count("MatMulNBits") == 2
    assert result.default_differences.keys() == result.differences.keys()
    assert result.default_difference == pytest.approx(float((default - expected).abs().max()), rel=0.5)
    assert result.default_difference > 10 * result.difference
    assert any(LEVEL in note for note in result.notes)


def test_a_weight_that_is_used_twice_is_fused_in_both_places(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(64, 64, bias=False), nn.Linear(64, 3)

        def forward(self, x):
            return self.out(self.first(self.first(x).relu()))

    torch.manual_seed(0)
    net = Twice().eval()
    quantize(net, [torch.randn(16, 5, 64)], group_size=32, **FAST)
    x = torch.randn(2, 5, 64)
    result = export_onnx(net, tmp_path / "net.onnx", x, fused=True)
    assert result.difference < 1e-5
    assert set(result.types) == {"first.weight", "out.weight"}
