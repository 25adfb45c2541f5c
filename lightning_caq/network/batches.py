"""Calibration batches: how they are collected and checked, and how a few samples of them are chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.errors import CalibrationError
from lightning_caq.network.forward import Batch, Forward, cut, run_model
from lightning_caq.network.outputs import Outputs
from lightning_caq.utilities.structures import describe, is_object, map_tensors, named_tensors, tensors

HELD_OUT = 0.125  # of the samples, to judge by


def check_model_takes(model: nn.Module, batch: Any) -> Outputs:
    """Run a model on its first calibration batch, and say clearly what is wrong if it cannot take it.

    Raises:
        CalibrationError: If the model fails on the batch, or its output is not a finite floating-point tensor.
    """
    try:
        outputs = run_model(model, batch)
    except FAILURES as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(cannot_take(model, batch, error)) from error
    if not bool(torch.isfinite(outputs.values).all()):
        raise CalibrationError(
            f"{type(model).__name__} returns NaN or infinite outputs on the first calibration batch."
        )
    return outputs


FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError, AssertionError)
"""What a network raises that is given something it cannot take."""


def cannot_take(model: nn.Module, batch: Any, error: Exception) -> str:
    """What to say of a network that fails on a batch."""
    data = batch.data if isinstance(batch, Batch) else batch
    return (
        f"{type(model).__name__} cannot take a calibration batch of {describe(data)} "
        f"({type(error).__name__}: {error}); a batch must be a tensor, a tuple that starts with forward's arguments, "
        "or a mapping of them; for others give forward_fn, a function of (module, batch) that returns the outputs."
    )


def batch_size(batch: Any) -> int:
    """Number of samples: of a batch as it is the length of its first tensor; 1 of an object, 0 if there is none."""
    if isinstance(batch, Batch):
        return batch.size
    first = next((tensor for tensor in tensors(batch) if tensor.ndim), None)
    return len(first) if first is not None else int(is_object(batch))


def take_samples(batches: Sequence[Any], samples: int, *, skip: int = 0) -> list[Any]:
    """Samples ``skip`` to ``skip + samples``; a batch that holds others too is cut.

    Example:
        >>> [len(b) for b in take_samples([torch.zeros(4, 1), torch.zeros(4, 1)], 6)]
        [4, 2]
        >>> [len(b) for b in take_samples([torch.zeros(4, 1), torch.zeros(4, 1)], 8, skip=6)]
        [2]
    """
    taken: list[Any] = []
    start = 0
    for batch in batches:
        size = batch_size(batch)
        first, last = max(skip - start, 0), min(skip + samples - start, size)
        if first < last:
            taken.append(batch if last - first == size else pick(batch, slice(first, last)))
        start += size
    return taken


def split_samples(batches: Sequence[Any], held_out: float = HELD_OUT) -> tuple[list[Any], list[Any]]:
    """Samples to fit to, and the last ones to judge by; a single sample does both.

    Example:
        >>> fitted, others = split_samples([torch.zeros(8, 1), torch.zeros(8, 1)])
        >>> [len(b) for b in fitted], [len(b) for b in others]
        ([8, 6], [2])
    """
    samples = sum(batch_size(batch) for batch in batches)
    keep = samples - max(1, round(held_out * samples)) if samples > 1 else 1
    return take_samples(batches, keep), take_samples(batches, samples, skip=keep) or list(batches)


def pick(batch: Any, samples: slice | list[int]) -> Any:
    """Some samples of a batch; those of a list may be taken several times.

    Example:
        >>> pick((torch.arange(3), "text"), [2, 2])
        (tensor([2, 2]), 'text')
    """
    if isinstance(batch, Batch):
        return batch.take(samples)
    size = batch_size(batch)
    axes = {path: 0 for path, tensor in named_tensors(batch) if tensor.ndim and len(tensor) == size}
    return cut(batch, axes, samples)


def calibration_batches(
    batches: Iterable[Any],
    samples: int,
    device: torch.device | None = None,
    *,
    convert: Callable[[Any], Any] | None = None,
    bind: Callable[[Any], Forward] | None = None,
) -> list[Any]:
    """Collect up to ``samples`` samples and check that they can be used.

    Args:
        batches: Re-iterable batches, such as a list or a DataLoader.
        samples: How many samples to keep.
        device: Where to move the tensors; left where they are by default.
        convert: Called with each batch, once it is there.
        bind: Called with the first batch; finds how a network is run on them.

    Returns:
        The batches, as normal tensors that autograd may use; if ``bind`` is given, each with how it is run.

    Raises:
        CalibrationError: If ``batches`` is an iterator that can be read once only, or holds no sample.

    Example:
        >>> len(calibration_batches([torch.zeros(8, 3)] * 4, samples=20))
        3
    """
    if not isinstance(batches, Iterable):
        raise CalibrationError(f"batches must be an iterable of batches, got {type(batches).__name__}.")
    if isinstance(batches, (Tensor, Mapping)):
        raise CalibrationError(
            f"batches must be an iterable of batches, got one {describe(batches)}; put it in a list."
        )
    if isinstance(batches, Iterator):
        raise CalibrationError(
            f"batches must be re-iterable, got a one-shot {type(batches).__name__}; pass a list or a DataLoader."
        )
    kept: list[Any] = []
    forward: Forward | None = None
    seen = 0
    for index, batch in enumerate(batches):
        size = batch_size(batch)
        if size == 0:
            raise CalibrationError(f"Calibration batch {index} holds no samples: {describe(batch)}.")
        if not isinstance(batch, Batch):
            batch = _copied(batch, device)
            batch = batch if convert is None else convert(batch)
            if bind is not None:
                forward = forward or bind(batch)
                batch = Batch(batch, forward)
                size = batch.size if forward.cuttable else size
        kept.append(batch)
        seen += size
        if seen >= samples:
            break
    if not kept:
        raise CalibrationError("batches is empty; quantization needs at least one calibration batch.")
    return take_samples(kept, samples)


def _copied(batch: Any, device: torch.device | None) -> Any:
    """A copy that autograd may use; objects of unknown classes, such as graphs, are moved in their own way."""
    if is_object(batch):
        moved = copy.copy(batch)
        return moved.to(device) if device is not None and callable(getattr(moved, "to", None)) else moved
    return map_tensors(lambda path, t: t.detach().clone().to(device), batch)
