"""Networks with several inputs and outputs, of sizes that vary, in ONNX Runtime."""

import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import ExportError
from lightning_caq.export.onnx import export_onnx
from lightning_caq.export.onnx_inputs import read_example

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

FAST = {"avg_bits": 4, "compare": (), "guard": False, "curvature_samples": 8, "eigenpairs": 2, "rounding": "nearest"}


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scores, self.box = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x, mask=None):
        hidden = torch.relu(self.body(x))
        if mask is not None:
            hidden = hidden * mask[..., None]
        return {"scores": self.scores(hidden), "box": self.box(hidden), "best": self.scores(hidden).argmax(-1)}


class _OneDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _Two()

    def forward(self, batch):
        out = self.net(batch["x"], batch["mask"])
        return out["scores"], out["box"]


def _run(path, **inputs):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # inputs are not rounded
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert {x.name for x in session.get_inputs()} == inputs.keys()
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return dict(zip((x.name for x in session.get_outputs()), map(torch.from_numpy, found), strict=True))


def _quantized(net, batches):
    quantize(net, batches, **FAST)
    return net.eval()


def test_every_input_and_output_by_name(tmp_path):
    x, mask = torch.randn(16, 5, 6), torch.ones(16, 5)
    net = _quantized(_Two(), [{"x": x, "mask": mask}])
    for example in ((x[:2], mask[:2]), {"x": x[:2], "mask": mask[:2]}):
        result = export_onnx(net, tmp_path / "net.onnx", example)
        assert result.differences.keys() == {"scores", "box", "best"}
        found, expected = _run(result.path, x=x, mask=mask), net(x, mask)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), atol=1e-5, rtol=1e-4)


def test_a_dict_that_is_the_one_argument(tmp_path):
    x, mask = torch.randn(16, 5, 6), torch.ones(16, 5)
    net = _quantized(_OneDict(), [{"x": x, "mask": mask}])
    result = export_onnx(net, tmp_path / "net.onnx", {"x": x[:2], "mask": mask[:2]})
    found = _run(result.path, x=x[:3], mask=mask[:3])
    for value, expected in zip(found.values(), net({"x": x[:3], "mask": mask[:3]}), strict=True):
        torch.testing.assert_close(value, expected.detach(), atol=1e-5, rtol=1e-4)


def test_dimensions_that_vary_do(tmp_path):
    x, mask = torch.randn(16, 5, 6), torch.ones(16, 5)
    net = _quantized(_Two(), [{"x": x, "mask": mask}])
    axes = {0: "batch", 1: "length"}
    result = export_onnx(net, tmp_path / "net.onnx", (x[:2], mask[:2]), dynamic_shapes={"x": axes, "mask": axes})
    assert not any("twice" in note for note in result.notes)
    names = [d.dim_param or d.dim_value for d in onnx.load(result.path).graph.input[0].type.tensor_type.shape.dim]
    assert names == ["batch", "length", 6]
    for shape in ((1, 9), (7, 3)):
        x, mask = torch.randn(*shape, 6), torch.rand(shape).round()
        expected = net(x, mask)
        for name, value in _run(result.path, x=x, mask=mask).items():
            torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=1e-4)


def test_images_of_any_size(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)).eval()
    net = _quantized(net, [torch.randn(16, 3, 12, 12)])
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    result = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 3, 12, 10), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 17, 31)
    torch.testing.assert_close(_run(result.path, input=x)["output"], net(x).detach(), atol=1e-5, rtol=1e-4)


def test_earlier_opsets_have_uint8_alone(tmp_path):
    net = _quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(16, 6)])
    for opset in (18, 20, 21, 22):
        result = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 6), opset=opset)
        assert [x.version for x in onnx.load(result.path).opset_import if not x.domain] == [opset]
        assert set(result.types.values()) <= ({"uint8"} if opset < 21 else {"uint4", "uint8", "uint16"})


def test_what_cannot_be(tmp_path):
    net = _quantized(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(16, 6)])
    x = torch.randn(2, 6)
    for kwargs, message in (
        ({"opset": 17}, "opset=17 is not allowed; give a number from 18 to 23"),
        ({"dynamic_shapes": {"y": {0: "batch"}}}, "names the input 'y'; the inputs are 'input'"),
        ({"dynamic_shapes": {"input": {2: "batch"}}}, "has dimensions 0 to 1"),
        ({"dynamic_shapes": {"input": {0: "a b"}}}, "takes a name such as"),
        (
            {"dynamic_shapes": {"input": {1: "features"}}},
            "Dimension 1 of the input 'input' cannot vary: the network fixes it at 6",
        ),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(net, tmp_path / "net.onnx", x, **kwargs)
        assert not (tmp_path / "net.onnx").exists()


def test_what_onnx_runtime_computes_otherwise_by_default_is_noted(tmp_path):
    net, x = _quantized(_Two(), [torch.randn(16, 5, 6)]), torch.randn(4, 5, 6)
    result = export_onnx(net, tmp_path / "net.onnx", x)
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["box"], {"x": x.numpy()})[0])
    apart = float((found - net(x)["box"].detach()).abs().max()) > 1e-4
    assert any("qdq_matmulnbits_accuracy_level" in note for note in result.notes) == apart


def test_names_of_nested_inputs():
    class Nested(nn.Module):
        def forward(self, first, *others, last=None): ...

    a = torch.zeros(1)
    for example, names in (
        (a, ["first"]),
        ((a, {"x": a, "y": (a, a)}), ["first", "x", "input_1_y_0", "input_1_y_1"]),
        ({"first": {"x": a}, "last": {"x": a}}, ["first_x", "last_x"]),
    ):
        assert list(read_example(Nested(), example).named) == names
