"""Drawn samples: calibration data chosen at random from a data set, so that a seed stands for a choice of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

_BATCH = 64  # samples of a batch, of a data set that comes without a loader


def drawn(data: Any, samples: int, seed: int) -> Any:
    """A loader of randomly drawn items, where ``data`` can be drawn from; otherwise ``data`` itself.

    That are data sets with indices, and plain loaders of them, whether they shuffle or not: read from its start, sorted
    data would show one class only. A loader with a sampler of its own may pick a part, or sort.

    Args:
        data: A loader, a data set, or anything else.
        samples: How many items are wanted; all are taken where there are no more.
        seed: Seed of the draw.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.arange(100.0))
        >>> [len(batch[0]) for batch in drawn(DataLoader(data, batch_size=4), 6, seed=0)]
        [4, 2]
        >>> drawn([torch.zeros(2)], 6, seed=0)
        [tensor([0., 0.])]
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        data = DataLoader(data, batch_size=_BATCH)
    if not _reads_whole_dataset(data):
        return data
    count = len(data.dataset)
    chosen = np.random.default_rng(seed).choice(count, min(samples, count), replace=False)
    return DataLoader(Subset(data.dataset, chosen.tolist()), batch_size=data.batch_size, collate_fn=data.collate_fn)


def _reads_whole_dataset(loader: Any) -> bool:
    """Whether drawing from the dataset gives what the loader gives; a custom sampler may pick a part, or sort it."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
        and isinstance(loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler))
        and isinstance(loader.batch_sampler, BatchSampler)
        and type(loader.batch_sampler).__iter__ is BatchSampler.__iter__
    )
