"""On a GPU: what comes out on the CPU comes out there, wherever the batches lie and whatever the precision of training.

Sums are taken in another order on a GPU, so numbers agree to their last digits only, and a code whose weight lies half
way between two values may be the other one.
"""

from __future__ import annotations

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from lit import Classifier, blobs, fit, is_quantized, quantizer, train_loader, trainer, val_loader
from torch import nn

from lightning_caq import load_quantized, measure, quantize, save_quantized
from lightning_caq.quantizers.fake_quant.modules import on_grid
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.utilities.contexts import full_float32

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use through CUDA"),
    pytest.mark.usefixtures("no_figures"),
]

TEST = nets.images(400, 2)
FAST = {"curvature_samples": 48, "eigenpairs": 8, "loss_fn": nets.image_loss, "compare": (), "guard": False}
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def accuracy(net):
    return {"acc": nets.accuracy(net, *(part.to(next(net.parameters()).device) for part in TEST))}


def quantized(net, device, batches=None, **options):
    """A copy of the network, quantized on a device; the batches lie on the CPU if none are given."""
    options = {
        "evaluate": accuracy,
        **FAST,
        **({} if {"bops", "max_drop"} & options.keys() else {"avg_bits": 3}),
        **options,
    }
    return quantize(copy.deepcopy(net).to(device), batches or nets.image_batches(), **options)


def image_batches_on_gpu():
    return [(x.cuda(), y.cuda()) for x, y in nets.image_batches()]


def differing_codes(one, other):
    """The largest share of codes of a layer that are not the same."""
    layers = zip(one.plan.layers, other.plan.layers, strict=True)
    return max(float((a.codes != b.codes).float().mean()) for a, b in layers)


OPTIONS = {
    "cet": {},
    "cet, guarded and compared": {"guard": True, "compare": ("uniform", "caq")},
    "caq": {"method": "caq"},
    "a search": {"method": "evolution"},
    "traces": {"method": "hawq_v2"},
    "task": {"objective": "task"},
    "task, caq": {"objective": "task", "method": "caq"},
    "nearest": {"rounding": "nearest"},
    "long axis": {"rounding": "long_axis"},
    "long axis, task": {"rounding": "long_axis", "objective": "task"},
    "inputs of 8 bits": {"activation_bits": 8},
    "inputs of 4 bits": {"activation_bits": 4},
    "mixed inputs": {"activation_bits": "mixed", "bops": 3e-4},
    "statistics kept": {"batchnorm": "keep"},
    "groups of channels": {"granularity": "channel_group"},
    "groups of channels, task": {"granularity": "channel_group", "objective": "task"},
    "codebook": {"quantizer": "codebook"},
    "a study": {"study": True},
    "largest drop": {"max_drop": 0.02, "monitor": "acc"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_network_is_that_of_the_cpu(net, options):
    expected, found = (quantized(net, device, **options) for device in ("cpu", "cuda"))
    assert {t.device.type for t in found.model.state_dict().values()} == {"cuda"}
    assert all(on_grid(m.weight, rounding_state(m).grid) for m in quantized_modules(found.model).values())
    assert found.plan.widths == expected.plan.widths
    assert found.plan.activation_bits == expected.plan.activation_bits
    assert differing_codes(found, expected) < 0.05
    ours, theirs = (result.report.metrics["quantized/acc"] for result in (found, expected))
    assert ours == pytest.approx(theirs, abs=0.02)
    assert accuracy(found.model.eval())["acc"] == ours


def embedding():
    return nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3))


def attention():
    return nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(30, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])


def pixels():
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2))


@pytest.mark.parametrize("method", ["cet", "caq"])
@pytest.mark.parametrize("make", [embedding, attention, Recurrent, pixels])
def test_other_networks(make, method):
    net = make()
    batch = torch.randint(0, 20, (48, 5)) if make is embedding else torch.randn(48, 5, 6)
    options = {"method": method, "loss_fn": None, "evaluate": None, "curvature_samples": 16}
    expected, found = (quantized(net, device, [batch], **options) for device in ("cpu", "cuda"))
    assert found.plan.bits == expected.plan.bits
    kappas = ([row.kappa for row in result.profile.layers] for result in (found, expected))
    assert next(kappas) == pytest.approx(next(kappas), rel=1e-3)


def test_batches_may_lie_on_either_device_and_a_seed_gives_the_same_again(net):
    once, again, moved = (quantized(net, "cuda", batches) for batches in (None, None, image_batches_on_gpu()))
    for other in (again, moved):
        assert other.plan.bits == once.plan.bits
        assert differing_codes(other, once) == 0
        assert other.profile.eigenvalues == pytest.approx(once.profile.eigenvalues, rel=1e-4)


def test_a_network_on_the_cpu_takes_batches_on_a_gpu(net):
    expected, found = (quantized(net, "cpu", batches) for batches in (None, image_batches_on_gpu()))
    assert found.plan.bits == expected.plan.bits
    assert differing_codes(found, expected) == 0


def test_curvature_is_measured_in_full_float32(net):
    """A matrix product may round its factors to TF32 where that is allowed, a convolution does so by default."""
    needs = frozenset({"kappa", "lipschitz", "trace"})
    expected = measure(net, nets.image_batches(), needs=needs)
    allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        found = measure(net.cuda(), nets.image_batches(), needs=needs)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", allowed[1])
    finally:
        torch.set_float32_matmul_precision(allowed[0])
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for name in needs:
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4)


def test_a_failure_leaves_weights_flags_and_random_states(net):
    net.cuda()
    net[1].eval()
    before, drawn = nets.picture(net), torch.cuda.get_rng_state()

    def fails_at_last(net):
        torch.rand(3, device="cuda")
        if quantized_modules(net):
            raise RuntimeError("not to my taste")
        return accuracy(net)

    with pytest.raises(RuntimeError, match="not to my taste"):
        quantize(net, nets.image_batches(), avg_bits=3, evaluate=fails_at_last, **FAST)
    nets.assert_same_picture(before, nets.picture(net))
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


def test_a_quantized_network_learns_on(net):
    net = quantized(net, "cuda").model.train()
    x, y = image_batches_on_gpu()[0]
    before = net[4].weight.detach().clone()
    F.cross_entropy(net(x), y).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(net[4].weight, before)
    with torch.no_grad():
        assert torch.isfinite(net(x)).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_files_go_from_a_gpu_to_any_device(net, device, packed, tmp_path):
    saved = quantized(net, "cuda", activation_bits=8).model.eval()
    path = save_quantized(saved, tmp_path / "net.safetensors")
    loaded = load_quantized(nets.small_cnn().to(device).eval(), path, packed=packed)
    assert {t.device.type for t in loaded.state_dict().values()} == {device}
    with torch.no_grad(), full_float32():
        outputs, expected = loaded(TEST[0].to(device)), saved.to(device)(TEST[0].to(device))
    assert torch.equal(outputs, expected)


@pytest.mark.parametrize("objective", ["distill", "task"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_callback_in_a_run_on_a_gpu(tmp_path, precision, objective):
    callback = quantizer(objective=objective, monitor_every_n_epochs=1)
    module, pl_trainer = fit(tmp_path, callback, accelerator="gpu", precision=precision)
    assert is_quantized(module, callback.plan)
    metrics = callback.report.metrics
    assert metrics["quantized/val_acc"] > metrics["float/val_acc"] - 0.1
    again = pl_trainer.validate(module, val_loader(), verbose=False)[0]
    assert again["val_acc"] == pytest.approx(metrics["quantized/val_acc"])
    assert again["val_loss"] == pytest.approx(metrics["quantized/val_loss"], rel=1e-3)


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_checkpoint_goes_from_one_device_to_the_other(tmp_path, first, then):
    callback, path = quantizer(), tmp_path / "quantized.ckpt"
    module, pl_trainer = fit(tmp_path, callback, accelerator=first)
    pl_trainer.save_checkpoint(path)
    other, attached = Classifier(), quantizer()
    there = trainer(tmp_path, accelerator=then, callbacks=[attached])
    found = torch.cat([p.cpu() for p in there.predict(other, val_loader(), ckpt_path=path, weights_only=False)])
    assert is_quantized(other, callback.plan)
    assert set(quantized_modules(other)) == {"net.0", "net.4"}
    with torch.no_grad():
        expected = module.cpu().eval()(blobs(48, seed=1).tensors[0])
    assert torch.allclose(found, expected, atol=1e-4)
    trainer(tmp_path, accelerator=then, max_epochs=1).fit(other, train_loader(), val_loader())  # and trains on there
