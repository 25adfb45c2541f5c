"""Running a module on a batch of which nothing is known yet, and cutting a batch that knows how it is run."""

from types import SimpleNamespace

import pytest
import torch
from every import every
from torch import nn

from lightning_caq.errors import CalibrationError
from lightning_caq.network.forward import Batch, Forward, quiet, run_model

X = torch.arange(12.0).reshape(6, 2)


class Net(nn.Module):
    """Returns what a test asks for."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Named(nn.Module):
    def forward(self, a, b=None, *, c=0.0):
        return a * 1.0 if b is None else a + b + c


def _run(net, batch):
    return run_model(net, batch).values


@every("batch", [X, (X, "label"), [X], [X, X, X]])
def test_the_first_item_is_the_input(batch):
    assert torch.equal(_run(nn.Identity(), batch), X)


def test_entries_of_a_dict_are_handed_to_their_arguments():
    assert torch.equal(_run(Named(), {"b": X, "a": 2 * X, "label": None}), 3 * X)
    assert torch.equal(_run(Named(), {"a": X}), X)
    assert torch.equal(_run(Named(), {"a": X, "b": X, "c": 1.0}), 2 * X + 1)


def test_a_dict_that_does_not_name_the_arguments_is_one_argument():
    assert torch.equal(_run(Net(lambda batch: batch["image"]), {"image": X}), X)


def test_a_forward_of_keywords_only():
    assert torch.equal(_run(Net(lambda *, image: image), {"image": X, "label": 1}), X)


@every("output", [X, (X, None), [X], {"logits": X, "loss": None}, {"first": X}, SimpleNamespace(logits=X)])
def test_outputs_in_any_container(output):
    assert torch.equal(_run(Net(lambda x: output), X), X)


def test_all_tensors_count():
    assert _run(Net(lambda x: {"a": x, "b": (x[:, :1], [x])}), X).shape == (6, 5)


@every("output", [None, "text", X.long(), (), {}, torch.tensor(1.0), {"logits": None}])
def test_outputs_without_a_tensor(output):
    with pytest.raises(CalibrationError, match=r"returned no floating-point tensor for a batch of float32\[6, 2\]"):
        run_model(Net(lambda x: output), X)


def test_a_batch_is_cut_along_its_own_axes():
    forward = Forward(lambda model, data: data["x"], (), axes={("x",): 1})
    batch = Batch({"x": X, "table": torch.ones(2, 9), "n": torch.tensor(3)}, forward)
    assert batch.size == 2
    part = batch.take([1, 1, 0])
    assert part.size == 3
    assert part.data["x"][0].tolist() == [1, 1, 0]
    assert part.data["table"].shape == (2, 9)
    assert part.take(slice(0, 1)).data["x"].shape == (6, 1)


def test_a_batch_that_cannot_be_cut_is_one_sample():
    batch = Batch(X, Forward(lambda model, data: data, (), cuttable=False))
    assert batch.size == 1
    assert batch.take([0]) is batch


def test_logging_inside_forward_is_quiet_and_comes_back():
    class Logging(nn.Module):
        calls = 0

        def log(self, *args):
            type(self).calls += 1

        def log_dict(self, *args):
            type(self).calls += 1

        def training_step(self, batch):
            """Only a LightningModule has one."""

        def forward(self, x):
            self.log("a", 1)
            self.log_dict({})
            return x

    net = nn.Sequential(Logging())
    run_model(net, X)
    with quiet(net):
        net(X)
    assert Logging.calls == 0
    assert not {"log", "log_dict"} & set(vars(net[0]))
    net(X)
    assert Logging.calls == 2


def test_logging_comes_back_when_passes_end_in_any_order():
    class Module(nn.Module):
        def training_step(self): ...

        def log(self): ...

        def log_dict(self): ...

    module = Module()
    module.log_dict = own = lambda: 1
    first, second = quiet(module), quiet(module)
    first.__enter__(), second.__enter__()
    assert module.log("x", 1) is None
    first.__exit__(None, None, None)
    assert module.log_dict({"x": 1}) is None
    second.__exit__(None, None, None)
    assert module.log_dict is own
    assert "log" not in vars(module)
