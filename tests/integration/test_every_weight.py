"""Every weight, whoever multiplies by it: quantized, saved, exported, trained on and restored, one kind a test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from lit import trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq import (
    CurvatureQuantizationCallback,
    QuantizationPlan,
    export_onnx,
    load_quantized,
    quantize,
    save_quantized,
)
from lightning_caq.errors import LayerError
from lightning_caq.quantizers.fake_quant.swap import restore_modules

LENGTH, SIZE, CLASSES = 5, 8, 3

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # torch's
]


class Classifier(lightning.pytorch.LightningModule):
    """A core on rows of vectors, its outputs averaged over positions, and a head."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core.eval()
        with torch.no_grad():
            width = self._mean(torch.zeros(1, LENGTH, SIZE)).shape[-1]
        self.head = nn.Linear(width, CLASSES)
        self.train()

    def _mean(self, x: Tensor) -> Tensor:
        y = self.core(x)
        return (y[0] if isinstance(y, tuple) else y).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._mean(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)  # far enough to other codes


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(SIZE, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(x, x[..., : self.attention.kdim], x[..., : self.attention.vdim])[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(SIZE, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0][:, None]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(SIZE, SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(x, x.flip(1))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(20, SIZE, mode="mean")

    def forward(self, x: Tensor) -> Tensor:
        return self.bags((10 * x[..., 0].abs()).long().clamp_max(19))[:, None]


class Functions(nn.Module):
    """A linear layer that functions use, as Swin's attention does, and a matrix that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.mix = nn.Linear(SIZE, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.proj.weight, self.proj.bias).relu() @ self.mix).tanh()


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, SIZE)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(SIZE, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CORES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attention": (lambda: SelfAttention(batch_first=True), 5),
    "attention, time first": (SelfAttention, 5),
    "attention of three weights": (lambda: SelfAttention(kdim=6, vdim=4, batch_first=True), 5),
    "encoder": (encoder, 13),
    "lstm": (lambda: nn.LSTM(SIZE, 6, num_layers=2, bidirectional=True, batch_first=True), 9),
    "lstm with projections": (lambda: nn.LSTM(SIZE, 6, proj_size=4, batch_first=True), 4),
    "gru": (lambda: nn.GRU(SIZE, 6, batch_first=True), 3),
    "rnn": (lambda: nn.RNN(SIZE, 6, batch_first=True), 3),
    "cell": (Cell, 3),
    "conv1d": (conv1d, 2),
    "bilinear": (Pairs, 2),
    "bags": (Bags, 2),
    "functions": (Functions, 3),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(SIZE, 6)), 2),
}


def build(name: str) -> Classifier:
    torch.manual_seed(0)
    return Classifier(CORES[name][0]()).eval()


def rows() -> Tensor:
    return torch.randn(32, LENGTH, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CORES)
def test_every_weight_is_quantized_saved_trained_and_restored(tmp_path, name):
    net, x = build(name), rows()
    floats, state = net(x), copy.deepcopy(net.state_dict())
    parameters, classes = dict(net.named_parameters()), [type(m) for m in net.modules()]
    baked = name == "weight norm"
    plan = quantize(net, [x], avg_bits=4, bits=(2, 4, 8), calibration_samples=32, compare=[], guard=False).plan
    assert len(plan.layers) == CORES[name][1]
    assert sum(plan.sizes.weights) == sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert all(len(torch.unique(row)) <= 2**b for b, w in weights(net, plan) for row in w.flatten(1))
    if not baked:
        assert list(net.state_dict()) == list(state)
        assert all(parameters[key] is p for key, p in net.named_parameters())

    with torch.no_grad():  # where fused layers would read weights past their modules
        expected = net(x)
        torch.testing.assert_close(net.train()(x), expected)
        net.eval()
        for packed in (False, True):
            other = load_quantized(build(name), save_quantized(net, tmp_path / "net.safetensors"), packed=packed)
            assert torch.equal(other(x), expected)
        again = build(name)
        again.load_state_dict(state)
        QuantizationPlan.load(plan.save(tmp_path / "plan.json")).apply(again)
        assert torch.equal(again(x), expected)
        assert torch.equal(copy.deepcopy(net)(x), expected)

    F.cross_entropy(net(x), torch.arange(32) % CLASSES).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim > 1)

    restore_modules(net)
    if not baked:
        net.load_state_dict(state)
        assert [type(m) for m in net.modules()] == classes
        assert torch.equal(net(x), floats)


def weights(net: nn.Module, plan: QuantizationPlan) -> list[tuple[int, Tensor]]:
    """Bits and weight of every layer, words and outputs first."""
    return [(plan.bits[x.name], net.get_submodule(x.name).weight.detach()) for x in plan.layers]


@pytest.mark.parametrize("name", CORES)
def test_onnx_runtime_computes_what_the_quantized_network_does(tmp_path, name):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    net, x = build(name), rows()
    quantize(net, [x], avg_bits=4, rounding="nearest", method="uniform", compare=[], guard=False)
    export = export_onnx(net, tmp_path / "net.onnx", x[:2])
    assert export.difference < 1e-5
    assert len(export.types) == CORES[name][1]


@pytest.mark.parametrize("name", CORES)
def test_a_callback_quantizes_every_weight_and_the_network_trains_on(tmp_path, name):
    module, loader = build(name).train(), DataLoader(TensorDataset(rows(), torch.arange(32) % CLASSES), batch_size=16)
    callback = CurvatureQuantizationCallback(
        avg_bits=4, calibration_samples=16, curvature_samples=8, compare=[], guard=False
    )
    trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loader, loader)
    assert len(callback.plan.layers) == CORES[name][1]
    assert not any("stay in float32" in note for note in callback.report.notes)
    settled = [w.clone() for _, w in weights(module, callback.plan)]
    trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loader, loader)
    found = weights(module, callback.plan)
    assert any(not torch.equal(old, new) for old, (_, new) in zip(settled, found, strict=True))
    assert all(len(torch.unique(row)) <= 2**b for b, w in found for row in w.flatten(1))


@pytest.mark.parametrize("name", ["attention, time first", "lstm", "encoder", "functions"])
def test_rounded_inputs_and_learned_scales_reach_parts(tmp_path, name):
    from lightning_caq.quantizers.fake_quant.learning import learning_scales

    net, x = build(name), rows()
    plan = quantize(net, [x], avg_bits=4, activation_bits=4, compare=[], guard=False).plan
    assert len(plan.activation_bits) == CORES[name][1]
    with torch.no_grad():
        expected = net(x)
        other = load_quantized(build(name), save_quantized(net, tmp_path / "net.safetensors"))
        assert torch.equal(other(x), expected)
        restore_modules(other)
        assert not torch.allclose(other(x), expected, atol=1e-4)  # inputs are rounded no more
        if name == "functions":
            with pytest.raises(LayerError, match="packed=False"):
                load_quantized(build(name), tmp_path / "net.safetensors", packed=True)
        else:
            packed = load_quantized(build(name), tmp_path / "net.safetensors", packed=True)
            torch.testing.assert_close(packed(x), expected)
    keys = list(net.state_dict())
    with learning_scales(net):
        net(x).square().mean().backward()
        assert list(net.state_dict()) == keys
        factors = [p.grad for key, p in net.named_parameters() if key.endswith("scale_factor")]
        assert len(factors) == len(plan.layers)
        assert all(g.abs().sum() > 0 for g in factors)


def test_a_float_checkpoint_in_a_quantized_network_runs_as_the_float_network():
    net, x = build("lstm"), rows()
    floats, state = net(x), copy.deepcopy(net.state_dict())
    quantize(net, [x], avg_bits=4, compare=[], guard=False)
    with pytest.warns(UserWarning, match="do not lie on its grids"):
        net.load_state_dict(state)
    torch.testing.assert_close(net(x), floats)


def test_a_failure_leaves_every_class_child_and_parameter():
    def fail(model: nn.Module) -> dict[str, float]:
        raise ValueError("no metrics")

    for name in ("attention", "lstm", "functions", "weight norm"):
        net, x = build(name), rows()
        before = [(type(m), list(m._modules), list(m._parameters.items())) for m in net.modules()]
        state = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="no metrics"):
            quantize(net, [x], avg_bits=4, evaluate=fail)
        after = [(type(m), list(m._modules), list(m._parameters.items())) for m in net.modules()]
        assert [x[:2] for x in after] == [x[:2] for x in before]
        assert all(
            p is q for a, b in zip(after, before, strict=True) for (_, p), (_, q) in zip(a[2], b[2], strict=True)
        )
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
