"""ONNX files in stock ONNX Runtime, against PyTorch."""

import copy
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.allocation.mixed import input_bits
from lightning_caq.errors import ExportError, LayerError
from lightning_caq.export import onnx as onnx_export
from lightning_caq.export.onnx import export_onnx
from lightning_caq.network.layers import find_layers, quantizable_layers
from lightning_caq.quantizers.calibration import calibrate_inputs
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, swap
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import fit_grid

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

RESNET20 = Path(__file__).parents[2] / "../shared/data/resnet20_cifar10.th"


def _swapped(net, bits):
    """The network on grids of its own; ``bits`` are given out in turn."""
    grids = {}
    for index, layer in enumerate(quantizable_layers(net)):
        weight = net.get_submodule(layer.name).weight
        grid = fit_grid(weight, bits[index % len(bits)], layer.channel_shape)
        with torch.no_grad():
            weight.copy_(grid.nearest(weight))
        grids |= dict.fromkeys(layer.modules, grid)
    swap(net, grids)
    return net.eval()


def _run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def _agree(net, path, x, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(_run(path, x)[0]), net(x), **tolerance)


def _integers(path, key):
    """Stored integers, scale and zero point of a weight, read by the onnx package itself."""
    found = {x.name: x for x in onnx.load(path).graph.initializer}
    return [onnx.numpy_helper.to_array(found[f"{key}.{part}"]) for part in ("codes", "scale", "zero_point")]


def test_mlp(tmp_path):
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))
    quantize(net, [torch.randn(64, 20)], avg_bits=4, bits=(2, 4, 8), method="uniform", compare=())
    net.train()
    result = export_onnx(net, tmp_path / "new" / "net.onnx", torch.randn(3, 20))
    assert result.path == tmp_path / "new" / "net.onnx"
    assert net.training  # the network is left as it was
    assert all(rounding_state(module).quantizing for module in (net[0], net[2], net[4]))
    assert result.difference <= 1e-5
    for rows in (1, 7):  # the number of samples may vary
        _agree(net.eval(), result.path, torch.randn(rows, 20))


def test_cnn_with_batch_norm(tmp_path):
    net = nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=40)
    quantize(net, [nets.images(64, 1)[0]], avg_bits=3, method="uniform", compare=())
    x = nets.images(32, 2)[0]
    result = export_onnx(net, tmp_path / "net.onnx", x[:4])
    _agree(net.eval(), result.path, x)


def test_resnet20(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from networks import ResNet, load_network

    net = load_network("resnet20", RESNET20.parent) if RESNET20.exists() else ResNet(3)
    _swapped(net, (2, 3, 2))
    x = torch.randn(4, 3, 32, 32)
    result = export_onnx(net, tmp_path / "net.onnx", x)
    _agree(net, result.path, x, atol=1e-4, rtol=1e-4)
    assert set(result.types.values()) == {"uint4"}
    assert len(result.types) == 20
    assert result.path.stat().st_size < 268_336  # half a byte a weight, and the rest


@every("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_stored_integers_give_the_very_weights(bits, tmp_path):
    torch.manual_seed(bits)
    net = _swapped(nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)), (bits,))
    result = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 9))
    for key, weight in (("0.weight", net[0].weight), ("2.weight", net[2].weight)):
        codes, scale, zero = _integers(result.path, key)
        whole = codes.astype(np.int32) - zero.astype(np.int32)[:, None]
        assert np.array_equal(whole.astype(np.float32) * scale[:, None], weight.detach().numpy())
    assert bool(result.notes) == any(kind != f"uint{bits}" for kind in result.types.values())


@every("name", nets.CONVOLUTIONS)
def test_convolutions_of_every_kind(name, tmp_path):
    make, shape = nets.CONVOLUTIONS[name]
    net, x = _swapped(nn.Sequential(make()), (3,)), torch.randn(2, *shape)
    _agree(net, export_onnx(net, tmp_path / "net.onnx", x).path, x)


def test_linear_layers_on_sequences_and_tied_tables(tmp_path):
    net = _swapped(nets.Words(), (3, 8))
    tokens = torch.randint(0, 6, (2, 5))
    result = export_onnx(net, tmp_path / "net.onnx", tokens)
    _agree(net, result.path, tokens)
    assert set(result.types) == {"table.weight", "mix.weight"}
    assert [x.op_type for x in onnx.load(result.path).graph.node].count("DequantizeLinear") == 2


def test_named_inputs_and_outputs(tmp_path):
    net = _swapped(nets.Named(), (4,))
    a, b = torch.randn(3, 3), torch.randn(3, 2)
    for example in ({"b": b, "a": a}, (a, b)):
        graph = onnx.load(export_onnx(net, tmp_path / "net.onnx", example).path).graph
        assert [x.name for x in graph.input] == (["b", "a"] if isinstance(example, dict) else ["a", "b"])
        assert [x.name for x in graph.output] == ["logits"]
    torch.testing.assert_close(torch.from_numpy(_run(tmp_path / "net.onnx", a, b)[0]), net(a, b)["logits"])


@every(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 1e-2)])
def test_other_floating_point_types(dtype, tolerance, tmp_path):
    net = _swapped(nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype), (3,))
    x = torch.randn(2, 9, dtype=dtype)
    _agree(net, export_onnx(net, tmp_path / "net.onnx", x).path, x, atol=tolerance, rtol=tolerance)


def test_no_traces_of_the_exporting_machine(tmp_path):
    net = _swapped(nets.small_cnn(), (3,))
    payload = export_onnx(net, tmp_path / "net.onnx", nets.images(2, 0)[0]).path.read_bytes()
    assert str(Path(__file__).parent).encode() not in payload
    assert b"site-packages" not in payload


def test_notes_say_what_was_widened(tmp_path):
    net = _swapped(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), (3, 6))
    notes = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 40)).notes
    assert [note.partition(";")[0].rstrip(".") for note in notes] == [
        "1 weight of 3 bits stored as uint4",
        "1 weight of 6 bits stored as uint8",
    ]


class Eigenvalues(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return torch.linalg.eigvals(self.fc(x)).real


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


@every(("make", "match"), [(Eigenvalues, "operator aten.linalg_eig"), (Branch, "Branch cannot be exported to ONNX: ")])
def test_networks_that_onnx_cannot_hold(make, match, tmp_path):
    net = _swapped(make(), (3,))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ExportError, match=match):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 3, 3))
    assert not (tmp_path / "net.onnx").exists()
    assert rounding_state(net.fc).quantizing
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())


def test_outputs_that_differ(tmp_path, monkeypatch):
    net, to_integers = _swapped(nn.Sequential(nn.Linear(5, 4)), (3,)), onnx_export.to_integers

    def wrong(weight, grid, types):
        stored = to_integers(weight, grid)
        stored.scale.mul_(1.001)
        return stored

    monkeypatch.setattr(onnx_export, "to_integers", wrong)
    with pytest.raises(ExportError, match=r"differs from PyTorch's by .*; rounding explains"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 5))
    assert not (tmp_path / "net.onnx").exists()


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(LayerError, match="Sequential has no quantized layer"):
        export_onnx(nn.Sequential(nn.Linear(3, 3)), tmp_path / "f", torch.randn(2, 3))
    net = _swapped(nn.Sequential(nn.Linear(3, 3)), (3,))
    with pytest.raises(ExportError, match="example_input must be a tensor"):
        export_onnx(net, tmp_path / "f", ([1.0, 2.0],))
    with pytest.raises(ExportError, match=r"cannot take example_input, list\(float32\[2, 4\]\) \(RuntimeError: mat1"):
        export_onnx(net, tmp_path / "f", torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"cannot take example_input, dict\(y: float32\[2, 3\]\) \(TypeError"):
        export_onnx(net, tmp_path / "f", {"y": torch.randn(2, 3)})
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"needs onnx, onnxruntime, onnxscript; run pip install 'lightning-caq\[onnx\]'"
    ):
        export_onnx(net, tmp_path / "f", torch.randn(2, 3))


def _with_inputs(net, grids):
    """The swapped network with the inputs of its modules rounded."""
    swap(net, {name: rounding_state(m).grid for name, m in quantized_modules(net).items()}, grids)
    return net


@every("bits", [2, 3, 4, 5, 8])
def test_rounded_inputs_are_the_very_ones(bits, tmp_path):
    net = nn.Sequential(nn.Linear(9, 9, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(9))  # the output is the rounded input itself
    grid = InputGrid(bits, 0.25, 1)
    _with_inputs(_swapped(net, (8,)), {"0": grid})
    result = export_onnx(net, tmp_path / "net.onnx", torch.randn(4, 9))
    x = torch.cat([torch.randn(64, 9) * 2, torch.arange(-9, 9).float().view(2, 9) / 8])  # ties too
    expected = np.clip(np.rint(x.numpy() / 0.25), -1, 2**bits - 2) * 0.25
    np.testing.assert_allclose(_run(result.path, x)[0], expected, rtol=1e-5, atol=1e-5)
    graph = onnx.load(result.path)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("DequantizeLinear") == 2
    assert kinds.count("Clip") == (bits < 8)
    assert [x.domain for x in graph.opset_import] == [""]


@every("bits", [4, 8])
def test_a_cnn_with_rounded_inputs(bits, tmp_path):
    net, x = _swapped(nets.small_cnn(), (3, 8)), nets.images(32, 2)[0]
    layers = find_layers(net, x)
    grids = calibrate_inputs(net, layers, [x], input_bits(len(layers), bits))
    _with_inputs(net, grids)
    result = export_onnx(net, tmp_path / "net.onnx", x[:4])
    assert rounding_state(net[0]).input_grid == grids["0"]
    assert rounding_state(net[0]).quantizing
    assert not any(m._forward_pre_hooks for m in net.modules())
    _agree(net, result.path, x, atol=1e-2, rtol=1e-2)


def test_tokens_are_not_rounded(tmp_path):
    net, tokens = _swapped(nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)), (4,)), torch.randint(0, 6, (5, 4))
    _with_inputs(net, {"0": InputGrid(4, 0.25, 8), "1": InputGrid(4, 0.25, 8)})
    result = export_onnx(net, tmp_path / "net.onnx", tokens)
    _agree(net, result.path, tokens)
    assert [node.op_type for node in onnx.load(result.path).graph.node].count("QuantizeLinear") == 1


def test_rounding_of_inputs_that_is_lost(tmp_path, monkeypatch):
    net = _with_inputs(_swapped(nn.Sequential(nn.Linear(9, 4)), (4,)), {"0": InputGrid(2, 1.0, 1)})
    monkeypatch.setattr(onnx_export.InputGrid, "nearest", lambda grid, values: values.float().round())
    with pytest.raises(ExportError, match="differs from PyTorch's"):
        export_onnx(net, tmp_path / "net.onnx", 5 * torch.randn(16, 9))


def test_a_torch_that_cannot_export_rounded_inputs(tmp_path, monkeypatch):
    net = _with_inputs(_swapped(nn.Sequential(nn.Linear(9, 4)), (4,)), {"0": InputGrid(4, 1.0, 1)})
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(ExportError, match=r"Rounded activations are exported by torch 2\.8 and later"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 9))
