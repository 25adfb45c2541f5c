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
    pick,
    take_samples,
)
from lightning_caq.utilities.structures import describe

X = torch.arange(12.0).reshape(6, 2)


class Net(nn.Module):
    """Returns what a test asks for."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


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
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_batches(batches, 100)


def test_picking_takes_samples_several_times_and_in_any_order():
    picked = pick((X, torch.arange(6), "text"), [5, 0, 5])
    assert picked[0][:, 0].tolist() == [10, 0, 10]
    assert picked[1].tolist() == [5, 0, 5]
