"""Precisions, and networks that are out of the ordinary: compiled, lazy, parametrized, recurrent, with attention."""

from __future__ import annotations

from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from lit import Classifier, blobs, train_loader, trainer, val_loader
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq import CurvatureQuantizationCallback
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

pytestmark = [
    pytest.mark.usefixtures("no_figures"),
    # torch's and Lightning's
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU|.*AMP with fp16"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),
    pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate"),
]


def quantizer(**options: Any) -> CurvatureQuantizationCallback:
    defaults = {"avg_bits": 3, "calibration_samples": 24, "curvature_samples": 8, "eigenpairs": 4, "compare": []}
    return CurvatureQuantizationCallback(**{**defaults, "guard": False, **options})


class Net(lightning.pytorch.LightningModule):
    """Any classifier of rows of eight numbers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def checked(folder: Any, module: Any, *, layers: set[str], objective: str = "task", **settings: Any) -> Any:
    """Fit, and look whether exactly these layers hold as many values as their bits can name, and what they compute."""
    callback = quantizer(objective=objective)
    t = trainer(folder, callbacks=[callback], max_epochs=1, **settings)
    t.fit(module, train_loader(), val_loader())
    assert set(callback.plan.bits) == layers
    assert {name: rounding_state(x).quantizing for name, x in quantized_modules(module).items()} == dict.fromkeys(
        layers, True
    )
    for name, bits in callback.plan.bits.items():
        weight = module.get_submodule(name).weight.detach()
        assert weight.isfinite().all()
        assert all(len(row.unique()) <= 2**bits for row in weight.reshape(len(weight), -1))
    predicted = torch.cat(t.predict(module, val_loader()))
    loss = F.cross_entropy(predicted.float(), blobs(48, seed=1).tensors[1])
    found = callback.report.metrics["quantized/val_loss"]
    assert found == pytest.approx(float(loss), abs=0.05 if predicted.element_size() < 4 else 1e-4)
    trainer(folder, max_epochs=1).fit(module, train_loader(), val_loader())  # nothing is poisoned: it trains on
    return callback


# ------------------------------------------------------------------------------------------------------ precisions


@pytest.mark.parametrize("precision", ["32", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"])
def test_precisions_leave_types_as_they_are_and_measure_finite_numbers(tmp_path, precision):
    class Plain(Classifier):  # Adam divides by less than half precision can hold
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback, module = quantizer(objective="task"), Plain()
    types: list[Any] = []

    class Look(lightning.pytorch.Callback):
        def on_train_end(self, t: Any, m: Any) -> None:
            types.append([x.dtype for x in m.state_dict().values()])

        on_fit_end = on_train_end

    look = Look()
    t = trainer(tmp_path, callbacks=[look, callback], max_epochs=1, precision=precision)
    t.fit(module, train_loader(), val_loader())
    assert types[0] == types[1]
    assert all(0 < row.kappa < float("inf") for row in callback.profile.layers)
    assert all(rounding_state(row).quantizing for row in quantized_modules(module).values())
    assert t.predict(module, val_loader())[0].isfinite().all()


def test_mixed_precision_measures_the_curvature_of_the_float32_network(tmp_path):
    """κ of a linear layer has a closed form, 2 σ₁²; autocast would give it two or three right digits."""
    callback, expected = quantizer(), []

    class Look(lightning.pytorch.Callback):
        def on_train_end(self, t: Any, m: Any) -> None:
            expected.append(2 * float(torch.linalg.svdvals(m.net[4].weight.detach().double())[0]) ** 2)

    t = trainer(tmp_path, callbacks=[Look(), callback], max_epochs=1, precision="bf16-mixed")
    t.fit(Classifier(), train_loader(), val_loader())
    kappa = {row.name: row.kappa for row in callback.profile.layers}
    assert kappa["net.4"] == pytest.approx(expected[0], rel=1e-3)


# --------------------------------------------------------------------------------------------------------- networks


class Attention(nn.Module):
    """Four tokens of two features: scaled dot-product attention between plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 12), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.unflatten(1, (4, 2))).chunk(3, dim=2)
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.unflatten(1, (4, 2)))[0][:, -1])


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x).tanh()).tanh())


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def images() -> nn.Sequential:
    net = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return net.to(memory_format=torch.channels_last)


NETWORKS: dict[str, tuple[Any, set[str]]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3)), {"net.0", "net.2"}),
    "channels_last": (images, {"net.1", "net.4"}),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3)),
        {"net.0", "net.2"},
    ),
    "lstm": (Recurrent, {"net.lstm.ih_l0", "net.lstm.hh_l0", "net.out"}),
    "attention": (Attention, {"net.qkv", "net.out"}),
    "one module twice": (Twice, {"net.first", "net.out"}),
}


@pytest.mark.parametrize("objective", ["task", "distill"])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore:caq. .*parametriz|.*parametriz")
def test_networks_out_of_the_ordinary(tmp_path, kind, objective):
    make, layers = NETWORKS[kind]
    module = Net(make())
    checked(tmp_path, module, layers=layers, objective=objective)
    if kind == "channels_last":
        assert module.net[1].weight.is_contiguous(memory_format=torch.channels_last)
    if kind == "one module twice":
        assert module.net.first is module.net.second


COMPILED = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="before torch 2.6 compiled modules cannot be run eagerly"
)


@COMPILED
def test_a_compiled_submodule(tmp_path):
    """``aot_eager`` refuses second derivatives as the full compiler does, and needs no C++ compiler."""
    net = linear()
    module = Net(nn.Sequential(torch.compile(net[:2], backend="aot_eager"), net[2]))
    checked(tmp_path, module, layers={"net.0._orig_mod.0", "net.1"})
    torch._dynamo.reset()


@COMPILED
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, while compiling log
def test_a_compiled_lightning_module(tmp_path):
    module = Net(linear())
    callback = quantizer(objective="task")
    t = trainer(tmp_path, callbacks=[callback], max_epochs=1)
    t.fit(torch.compile(module, backend="aot_eager"), train_loader(), val_loader())
    assert set(quantized_modules(module)) == {"net.0", "net.2"}
    assert all(row.kappa > 0 for row in callback.profile.layers)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------- steps and batches


def test_a_network_validated_in_inference_mode_trains_on(tmp_path):
    """Buffers and weights made under inference mode could never be trained with again."""
    module, callback = Net(linear()), quantizer(objective="task")
    module.train_dataloader = train_loader
    trainer(tmp_path, callbacks=[callback], inference_mode=True).validate(module, val_loader(), verbose=False)
    assert not any(x.is_inference() for x in (*module.parameters(), *module.buffers()))
    module.train()
    trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, train_loader(), val_loader())
    assert any("trained on" in note for note in callback.report.notes)


class Dicts(Net):
    """Sequence to sequence in dictionaries, a loss in a dictionary, and now and then no loss at all."""

    def forward(self, batch: Any) -> Tensor:
        return self.net(F.one_hot(batch["source"], 8).float())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            return None
        return {"loss": F.cross_entropy(self(batch).flatten(0, 1), batch["target"].flatten()), "more": 1}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self(batch).flatten(0, 1), batch["target"].flatten()))


@pytest.mark.filterwarnings("ignore:.*training_step. returned `None`")
@pytest.mark.parametrize("objective", ["task", "distill"])
def test_sequences_in_dictionaries_with_two_validation_loaders(tmp_path, objective):
    rows = [{"source": torch.randint(8, (5,)), "target": torch.randint(3, (5,))} for _ in range(32)]
    loader = DataLoader(rows, batch_size=8)
    module, callback = Dicts(linear()), quantizer(objective=objective)
    trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loader, [loader, loader])
    assert set(quantized_modules(module)) == {"net.0", "net.2"}
    both = {f"quantized/val_loss/dataloader_idx_{i}" for i in range(2)}
    assert both <= set(callback.report.metrics)


class TwoOptimizers(Net):
    """Two optimizers are stepped by hand; the loss is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def curvature_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.curvature_loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]


def test_several_optimizers_with_a_loss_of_the_module(tmp_path):
    checked(tmp_path, TwoOptimizers(linear()), layers={"net.0", "net.2"})


def test_several_training_loaders_feed_the_network_one_after_the_other(tmp_path):
    class Pairs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return sum(F.cross_entropy(self(x), y) for x, y in batch.values())

    loaders = {"a": train_loader(), "b": DataLoader(TensorDataset(*blobs(32, seed=5).tensors), batch_size=16)}
    module, callback = Pairs(linear()), quantizer()
    trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loaders, val_loader())
    assert set(quantized_modules(module)) == {"net.0", "net.2"}
    task = Pairs(linear())  # the loss takes the whole collection
    trainer(tmp_path, callbacks=[quantizer(objective="task")], max_epochs=1).fit(task, loaders, val_loader())
    assert set(quantized_modules(task)) == {"net.0", "net.2"}
