"""Samples that a seed draws."""

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_caq import quantize
from lightning_caq.network.drawn import drawn

DATA = TensorDataset(torch.arange(1000.0)[:, None])


def _values(loader):
    return [float(x) for batch in loader for x in batch[0]]


def test_a_seed_is_a_choice_of_samples():
    for data in (DATA, DataLoader(DATA, batch_size=32), DataLoader(DATA, batch_size=32, shuffle=True)):
        first, again, other = (_values(drawn(data, 200, seed)) for seed in (0, 0, 1))
        assert first == again != other
        assert len(set(first)) == 200
        assert 400 < sum(first) / 200 < 600  # not those of the start
    assert sorted(_values(drawn(DATA, 5000, 0))) == list(range(1000))


def test_what_cannot_be_drawn_from_is_left():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([torch.zeros(2, 1)])

    weighted = DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 1000, 8))
    for data in (weighted, DataLoader(Stream()), Stream(), [torch.zeros(2, 1)], "text"):
        assert drawn(data, 10, 0) is data


def test_quantize_draws_by_its_seed_where_there_are_more_samples_than_asked_for():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(400, 8))
    options = {"avg_bits": 3, "calibration_samples": 64, "curvature_samples": 16, "compare": (), "inplace": False}
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()

    def trace(batches, seed):
        return quantize(net, batches, seed=seed, **options).profile.trace

    listed = [data.tensors[0]]
    assert trace(data, 0) == trace(data, 0) != trace(data, 1)
    assert abs(trace(listed, 0) / trace(listed, 1) - 1) < 1e-3  # a list is taken from its beginning
