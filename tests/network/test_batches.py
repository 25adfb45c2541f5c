import pytest
import torch
from every import every
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_caq.errors import CalibrationError
from lightning_caq.network.batches import (
    batch_size,
    calibration_batches,
    check_model_takes,
    describe,
    run_model,
    take_samples,
)

X = torch.arange(12.0).reshape(6, 2)


class Net(nn.Module):
    """Returns what a test asks for."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Named(nn.Module):
    def forward(self, a, b=None, *, c=0.0):
        return a * 1.0 if b is None else a + b + c


class Output:
    logits = X


@every("batch", [X, (X, "label"), [X], [X, X, X]])
def test_the_first_item_is_the_input(batch):
    assert torch.equal(run_model(nn.Identity(), batch), X)


def test_entries_of_a_dict_are_handed_to_their_arguments():
    assert torch.equal(run_model(Named(), {"b": X, "a": 2 * X, "label": None}), 3 * X)
    assert torch.equal(run_model(Named(), {"a": X}), X)
    assert torch.equal(run_model(Named(), {"a": X, "b": X, "c": 1.0}), 2 * X + 1)


def test_a_dict_that_does_not_name_the_arguments_is_one_argument():
    net = Net(lambda batch: batch["image"])
    assert torch.equal(run_model(net, {"image": X}), X)


def test_a_forward_of_keywords_only():
    assert torch.equal(run_model(Net(lambda *, image: image), {"image": X, "label": 1}), X)


@every("output", [X, (X, None), [X], {"logits": X, "loss": None}, {"first": X}, Output()])
def test_outputs(output):
    assert torch.equal(run_model(Net(lambda x: output), X), X)


@every("output", [None, "text", X.long(), (), {}, torch.tensor(1.0), {"logits": None}])
def test_outputs_without_a_tensor(output):
    with pytest.raises(CalibrationError, match=r"returned no floating-point tensor for a batch of float32\[6, 2\]"):
        run_model(Net(lambda x: output), X)


@every(
    ("net", "batch"),
    [
        (nn.Linear(3, 1), X),
        (nn.Linear(2, 1), "text"),
        (nn.Linear(2, 1), {"picture": X}),
        (nn.Embedding(3, 2), torch.full((2, 2), 9)),
        (nn.Module(), X),
    ],
)
def test_a_model_that_cannot_take_the_batch(net, batch):
    with pytest.raises(CalibrationError) as error:
        check_model_takes(net, batch)
    assert str(error.value).startswith(f"{type(net).__name__} cannot take a calibration batch of {describe(batch)}")
    assert "\n" not in str(error.value).split(";")[-1]
    assert isinstance(error.value, ValueError)


def test_a_model_whose_outputs_are_not_finite():
    with pytest.raises(CalibrationError, match="returns NaN or infinite outputs"):
        check_model_takes(Net(lambda x: x / 0), X)


def test_errors_of_the_users_own_are_not_hidden():
    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_model_takes(Net(stop), X)


def test_sizes():
    assert batch_size(X) == 6
    assert batch_size(("name", {"x": X})) == 6
    assert batch_size({"label": None, "x": X[:2]}) == 2
    assert batch_size("text") == batch_size(torch.tensor(1.0)) == batch_size(()) == 0


def _flat(batches):
    return [x for batch in batches for x in (batch if isinstance(batch, torch.Tensor) else batch["x"])[:, 0].tolist()]


@every("skip", range(8))
@every("samples", range(8))
def test_taking_samples_is_slicing(samples, skip):
    batches = [X[:1], X[1:4], X[4:]]
    taken = take_samples(batches, samples, skip=skip)
    assert _flat(taken) == X[:, 0].tolist()[skip : skip + samples]
    assert all(len(batch) for batch in taken)


def test_cutting_keeps_the_structure_and_what_has_no_samples():
    batch = {"x": X, "nested": (X.long(), [X.double()]), "mean": torch.tensor(2.0), "table": torch.ones(9, 2), "n": 3}
    (cut,) = take_samples([batch], 4)
    assert torch.equal(cut["x"], X[:4])
    assert torch.equal(cut["nested"][0], X[:4].long())
    assert torch.equal(cut["nested"][1][0], X[:4].double())
    assert cut["mean"] == 2
    assert cut["table"].shape == (9, 2)
    assert cut["n"] == 3
    assert batch["x"].shape == (6, 2)


def test_calibration_batches_are_copies_up_to_the_number():
    source = [X.clone() for _ in range(5)]
    kept = calibration_batches(source, 15)
    assert [len(b) for b in kept] == [6, 6, 3]
    source[0].zero_()
    assert torch.equal(kept[0], X)


def test_no_more_batches_are_read_than_needed():
    class Counting:
        read = 0

        def __iter__(self):
            for _ in range(10):
                self.read += 1
                yield X

    source = Counting()
    calibration_batches(source, 7)
    assert source.read == 2


def test_a_data_loader():
    loader = DataLoader(TensorDataset(X, torch.arange(6)), batch_size=4)
    kept = calibration_batches(loader, 100)
    assert [len(x) for x, _ in kept] == [4, 2]


def test_tensors_of_inference_mode_become_normal():
    with torch.inference_mode():
        source = [X + 1]
    (kept,) = calibration_batches(source, 6)
    assert not kept.is_inference()


@every(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (iter([X]), "re-iterable, got a one-shot list_iterator"),
        ((x for x in [X]), "re-iterable, got a one-shot generator"),
        (3, "iterable of batches, got int"),
        (X, r"got one float32\[6, 2\]; put it in a list"),
        ({"x": X}, "got one dict"),
        ([X, X[:0]], "Calibration batch 1 holds no samples"),
        (["text"], "Calibration batch 0 holds no samples: str"),
        ([X, X / 0], "Calibration batch 1 holds NaN or infinite values"),
        ([(X, torch.tensor([float("nan")] * 6))], "Calibration batch 0 holds NaN"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_batches(batches, 100)


def test_descriptions():
    assert describe({"x": X, "y": (X.long(), 3)}) == "dict(x: float32[6, 2], y: tuple(int64[6, 2], int))"
