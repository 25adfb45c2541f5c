"""Free axes and caches of exports: what onnxruntime takes at sizes that the export has never seen."""

from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_caq import export_onnx, quantize

transformers = pytest.importorskip("transformers")
FAST = {"avg_bits": 4, "bits": (4,), "method": "uniform", "compare": (), "guard": False}


def _axes(path):
    graph = onnx.load(path).graph
    return {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.input}


def _run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def _tokens(batch, length):
    draw = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(30, (batch, length), generator=draw), "attention_mask": mask}


def _bert():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [_bert, _llama])
def test_batch_and_sequence_are_free_for_inputs_by_name(make, tmp_path):
    torch.manual_seed(0)
    net = make()
    quantize(net, [_tokens(8, 10)] * 10, **FAST)
    cached = getattr(net.config, "use_cache", None)
    result = export_onnx(net, tmp_path / "net.onnx", _tokens(1, 6))
    assert _axes(result.path) == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    assert getattr(net.config, "use_cache", None) == cached
    assert not result.notes or all("stored as" in note for note in result.notes)
    for batch, length in ((3, 17), (1, 4)):
        inputs = _tokens(batch, length)
        with torch.no_grad():
            expected = net(**inputs).logits
        assert torch.allclose(_run(result.path, inputs), expected, atol=1e-4)


class _OneLength(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(x + self.positions).mean(1)


def test_a_network_of_one_length_keeps_it(tmp_path):
    torch.manual_seed(0)
    net = _OneLength().eval()
    quantize(net, [{"x": torch.randn(16, 6, 8)}], **FAST)
    result = export_onnx(net, tmp_path / "net.onnx", {"x": torch.randn(2, 6, 8)})
    assert _axes(result.path) == {"x": ["batch", 6, 8]}
    x = torch.randn(5, 6, 8)
    assert torch.allclose(_run(result.path, {"x": x}), net(x).detach(), atol=1e-5)


class _Cached(nn.Module):
    """Returns a cache where its configuration asks for one, as transformers do."""

    def __init__(self):
        super().__init__()
        self.config, self.out = SimpleNamespace(use_cache=True), nn.Linear(8, 3)

    def forward(self, x):
        scores = self.out(x)
        return {"scores": scores, "cache": [scores]} if self.config.use_cache else {"scores": scores}


def test_caches_are_left_out_and_come_back(tmp_path):
    torch.manual_seed(0)
    net = _Cached().eval()
    quantize(net, [torch.randn(16, 8)], output=_scores, **FAST)
    result = export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8))
    assert list(result.differences) == ["scores"]
    assert [x.name for x in onnx.load(result.path).graph.output] == ["scores"]
    assert net.config.use_cache is True


def _scores(output):
    return output["scores"]


def test_the_cache_comes_back_when_an_export_fails(tmp_path):
    net = _Cached().eval()
    quantize(net, [torch.randn(16, 8)], output=_scores, **FAST)
    with pytest.raises(Exception, match="cannot take example_input"):
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 9))
    assert net.config.use_cache is True
