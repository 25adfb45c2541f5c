"""``quantize`` on networks, data, types and modes of every kind."""

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import LayerError
from lightning_caq.quantizers.fake_quant.modules import on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules

CALIBRATION = nets.images(96, 1)
FAST = {"curvature_samples": 48, "eigenpairs": 8}


def test_calibration_samples_are_a_limit(net):
    class Counting:
        read = 0

        def __iter__(self):
            for x in CALIBRATION[0].split(16):
                self.read += 1
                yield x

    source = Counting()
    result = quantize(net, source, avg_bits=3, calibration_samples=40, curvature_samples=100, compare=(), eigenpairs=4)
    assert source.read == 3
    assert result.profile.samples == 40


@every("method", ["cet", "caq"])
@every("name", ["tied", "twice", "pixels", "regression", "frozen_inplace"])
def test_other_networks(name, method):
    case = nets.make_case(name)
    net = case.net.float()
    batches = [b.float() if b.is_floating_point() else b for b in case.batches]
    before = [p.requires_grad for p in net.parameters()]
    result = quantize(net, batches, avg_bits=4, method=method, guard=False)
    assert result.plan.avg_bits <= 4
    assert all(on_grid(m.weight, rounding_state(m).grid) for m in quantized_modules(net).values())
    assert [p.requires_grad for p in net.parameters()] == before
    assert np.isfinite(list(result.report.metrics.values())).all()


@every("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    net, x = nets.mlp().to(dtype), torch.randn(40, 4).to(dtype)
    result = quantize(net, [x], avg_bits=4)
    assert result.plan.avg_bits <= 4
    assert net(x).dtype == dtype
    assert all(on_grid(m.weight, rounding_state(m).grid) for m in quantized_modules(net).values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("objective", ["distill", "task"])
def test_where_gradients_are_off(net, mode, objective):
    kwargs = {"avg_bits": 3, "objective": objective, "loss_fn": nets.image_loss, "compare": (), **FAST}
    expected = quantize(net, nets.image_batches(), inplace=False, **kwargs)
    with mode():
        found = quantize(net, [(x.clone(), y.clone()) for x, y in nets.image_batches()], **kwargs)
    assert found.plan.bits == expected.plan.bits
    assert nets.image_loss(net, nets.image_batches()[0]).requires_grad  # it can still be trained


def test_a_layer_that_no_batch_calls_stays_float():
    net = nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})
    net.forward = lambda x: net["used"](x)
    idle = net["idle"].weight.detach().clone()
    result = quantize(net, [torch.randn(30, 6)], avg_bits=3)
    assert any("36 weights are not counted" in note and "idle" in note for note in result.report.notes)
    assert set(result.plan.bits) == {"used"}
    assert torch.equal(net["idle"].weight, idle)
    assert result.plan.sizes.unquantized == 0
    restore_modules(net)
    with pytest.raises(LayerError, match="No calibration batch calls"):
        quantize(net, [torch.randn(30, 6)], avg_bits=3, include=["idle"])


@every("method", ["cet", "caq"])
def test_attention(method):
    """The fused layer multiplies by its projections itself, which are quantized all the same."""
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)).eval()
    result = quantize(net, [torch.randn(48, 5, 8)], method=method, avg_bits=3, compare=())
    attention = {f"0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")}
    assert set(result.plan.bits) == {*attention, "0.linear1", "0.linear2", "2"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_by_keyword():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=x)

    result = quantize(Net(), [torch.randn(30, 6)], avg_bits=3, compare=("caq",))
    assert result.plan.bits == {"fc": 3}
