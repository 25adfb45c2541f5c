"""Networks in integers: every pattern on ONNX Runtime, against the fake-quant network and the nodes it stands for."""

import copy
from collections import Counter

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import ExportError
from lightning_caq.export.onnx import export_onnx

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def _quantized(net, x, **options):
    """The network with weights and inputs of layers rounded to 8 bits, and a float copy of it."""
    floating = copy.deepcopy(net).eval()
    settings = {"avg_bits": 8, "bits": (8,), "activation_bits": 8, "runtime": "onnxruntime", "rounding": "nearest"}
    quantize(net, [x], method="uniform", compare=(), guard=False, batchnorm="keep", **(settings | options))
    return net.eval(), floating


def _kinds(path, tmp_path):
    """How often each operator occurs once ONNX Runtime has fused what it can."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def _run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _close(net, floating, path, x, factor=3.0):
    """Integers are as far from the fake-quant network as that is from the float one, up to a small factor."""
    with torch.no_grad():
        fake, exact = net(x), floating(x)
    assert (_run(path, x) - fake).norm() <= factor * (fake - exact).norm() + 1e-6 * exact.norm()
    assert (_run(path, x) - exact).norm() <= 0.15 * exact.norm()


def _norm(channels):
    """A normalization with statistics of its own, one of its factors negative."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-0.5, 1.5, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
        norm.running_mean.copy_(torch.linspace(-0.2, 0.3, channels))
        norm.running_var.copy_(torch.linspace(0.3, 2, channels))
    return norm


class Block(nn.Module):
    """A residual block with a projection, as in ResNet, and one without."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _norm(8), nn.ReLU(), nn.MaxPool2d(2))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), _norm(8))
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), _norm(16))
        self.short = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), _norm(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.a(x) + x)
        x = F.relu(self.b(x) + self.short(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Padded(nn.Module):
    """The shortcut without parameters of ResNets on CIFAR, and a mean over both axes at once."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.one(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.fc(F.relu(self.two(x) + short).mean((2, 3)))


class Inverted(nn.Module):
    """An inverted residual block with ReLU6 and a depthwise convolution, as in MobileNet-V2."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 12, 1), _norm(12), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), _norm(12), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(12, 3, 1), _norm(3))
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        stem = self.narrow(self.deep(self.wide(x)))
        x = stem + self.narrow(self.deep(self.wide(stem)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gated(nn.Module):
    """SiLU and squeeze-and-excitation, as in EfficientNet."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = F.silu(self.one(x))
        x = self.two(x) * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.last(x)


class Branches(nn.Module):
    """Branches that are concatenated, one of them averaged, as in Inception, and LeakyReLU."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = F.leaky_relu(self.one(x), 0.1)
        return self.last(torch.cat([self.two(x), F.avg_pool2d(x, 3, 1, 1)], 1))


PATTERNS = {
    "residual": (Block, {"QLinearConv": 4, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    "padded": (Padded, {"QLinearConv": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    "inverted": (Inverted, {"QLinearConv": 6, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    "gated": (Gated, {"QLinearConv": 4, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearGlobalAveragePool": 1}),
    "branches": (Branches, {"QLinearConv": 3, "QLinearConcat": 1, "QLinearAveragePool": 1, "QLinearLeakyRelu": 1}),
}


@every("name", PATTERNS)
def test_patterns_are_fused_and_give_what_the_fake_quant_network_gives(name, tmp_path):
    make, kernels = PATTERNS[name]
    torch.manual_seed(1)
    x = torch.randn(32, 3, 16, 16)
    net, floating = _quantized(make(), x)
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    kinds = _kinds(result.path, tmp_path)
    assert kernels.items() <= kinds.items(), kinds
    assert not kinds.keys() & {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Mul", "Relu", "BatchNormalization"}
    assert set(result.types.values()) == {"int8"}
    assert not any("Not in integers" in note for note in result.notes)
    _close(net, floating, result.path, torch.randn(8, 3, 16, 16))


def test_multilayer_perceptrons(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    net, _ = _quantized(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), x)
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    kinds = _kinds(result.path, tmp_path)
    assert kinds == {"QuantizeLinear": 1, "QGemm": 2}
    # Nothing but inputs of layers is rounded: the outputs are those of the fake-quant network.
    with torch.no_grad():
        torch.testing.assert_close(_run(result.path, x[:9]), net(x[:9]), atol=1e-5, rtol=1e-4)


def test_transformers_multiply_in_integers_and_look_up_codes(tmp_path):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
            self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, tokens):
            x = self.norm(self.words(tokens))
            return x + self.narrow(F.gelu(self.wide(x)))

    tokens = torch.randint(0, 50, (16, 6))
    net, _ = _quantized(Net(), tokens)
    result = export_onnx(net, tmp_path / "net.onnx", tokens, integers="all")
    kinds = _kinds(result.path, tmp_path)
    assert kinds["MatMulIntegerToFloat"] == 2
    assert "DequantizeLinear" not in kinds  # no table is turned into numbers as a whole
    notes = " ".join(result.notes)
    assert "LayerNormalization" in notes
    assert "Gelu" in notes
    with torch.no_grad():
        torch.testing.assert_close(_run(result.path, tokens), net(tokens), atol=1e-5, rtol=1e-4)


def test_four_bits_are_stored_as_such(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 16, 16)
    net, floating = _quantized(Block(), x, avg_bits=4, bits=(4,), rounding="error_feedback")
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    assert set(result.types.values()) == {"uint4"}
    assert _kinds(result.path, tmp_path)["QLinearConv"] == 4
    stored = {i.name: i for i in onnx.load(result.path).graph.initializer}["b.0.weight.codes.stored"]
    assert len(stored.raw_data) == 16 * 8 * 9 // 2
    _close(net, floating, result.path, x)


def test_folded_normalization_is_that_of_the_network(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    net, _ = _quantized(nn.Sequential(nn.Conv2d(3, 8, 3), _norm(8)), x)
    path = export_onnx(net, tmp_path / "net.onnx", x, integers="all").path
    found = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    step = found["0.weight.scale"].astype(np.float64)[:, None, None, None]
    values = found["0.weight.codes"] * step
    norm = net[1]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    expected = net[0].weight.detach().double() * factor[:, None, None, None]
    assert (np.abs(values - expected.numpy()) <= 1.01 * step).all()
    positive = (factor > 0).numpy()  # the others lose the code -128, for which there is no 128
    np.testing.assert_allclose(values[positive], expected.numpy()[positive], rtol=1e-5, atol=1e-7)
    bias = next(found[k] * found[k.replace("codes", "scale")] for k in found if k.endswith("bias.codes"))
    expected = (net[0].bias - norm.running_mean) * factor + norm.bias
    np.testing.assert_allclose(bias, expected.detach().numpy(), atol=1e-3)


def test_what_breaks_the_chain_is_named(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net, floating = _quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3)), x)
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    assert any("HardSwish is computed in floating point" in note for note in result.notes)
    assert _kinds(result.path, tmp_path)["QLinearConv"] == 2
    _close(net, floating, result.path, x)


def test_layers_without_an_integer_kernel_stay_in_floating_point(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net, floating = _quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3)), x)
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    assert any("ConvTranspose" in note for note in result.notes)
    assert _kinds(result.path, tmp_path)["QLinearConv"] == 1
    _close(net, floating, result.path, x)


def test_a_channel_that_is_nothing_but_its_bias(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), _norm(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].weight[1] *= 1e-9
    x = torch.randn(16, 3, 8, 8)
    net, floating = _quantized(net, x)
    _close(net, floating, export_onnx(net, tmp_path / "net.onnx", x, integers="all").path, x)


def test_refusals_leave_no_file(tmp_path):
    x = torch.randn(32, 20)
    path = tmp_path / "net.onnx"
    for options, words in (({"activation_bits": None}, "activation_bits=8"), ({"activation_bits": 4}, "rounded to 4")):
        net, _ = _quantized(nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)), x, **options)
        with pytest.raises(ExportError, match=words):
            export_onnx(net, path, x, integers="all")
    with pytest.raises(ExportError, match="'weights' or 'all'"):
        export_onnx(net, path, x, integers="some")
    assert not path.exists()


def test_weights_beyond_a_signed_byte_stay_in_floating_point(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 20)
    net = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        net[0].weight.abs_()  # an asymmetric grid from zero up has codes to 255
    net, _ = _quantized(net, x, runtime="any")
    result = export_onnx(net, tmp_path / "net.onnx", x, integers="all")
    assert any("runtime='onnxruntime'" in note for note in result.notes)
    with torch.no_grad():
        torch.testing.assert_close(_run(result.path, x), net(x), atol=1e-4, rtol=1e-3)


def test_small_networks_of_other_tests(tmp_path):
    net = nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=40)
    x = nets.images(64, 1)[0]
    net, floating = _quantized(net, x)
    _close(net, floating, export_onnx(net, tmp_path / "net.onnx", x, integers="all").path, nets.images(32, 2)[0])
