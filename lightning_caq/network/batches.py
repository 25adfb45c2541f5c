"""Calibration batches: how a batch is handed to a model, and how a few of them are chosen and checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_caq.errors import CalibrationError

HELD_OUT = 0.125  # of the samples, to judge by


def run_model(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch and return its output tensor.

    Args:
        model: The network.
        batch: A tensor, a tuple or list whose first item is the input, or a mapping. Of a mapping the entries that
            ``model.forward`` names are passed as keywords; if it does not name all that it needs, the whole mapping
            is passed as one argument.

    Returns:
        The output: the tensor itself, the first item of a sequence, or ``logits`` of a mapping or output object.

    Raises:
        CalibrationError: If the model returns no floating-point tensor.

    Example:
        >>> run_model(nn.Linear(2, 1), (torch.zeros(5, 2), torch.zeros(5))).shape
        torch.Size([5, 1])
    """
    args, kwargs = _arguments(model, batch)
    output = _output_tensor(model(*args, **kwargs))
    if output is None:
        raise CalibrationError(
            f"{type(model).__name__}.forward returned no floating-point tensor for a batch of {describe(batch)}; "
            "return the output tensor, a tuple that starts with it, or a mapping with 'logits'."
        )
    return output


def check_model_takes(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on its first calibration batch, and say clearly what is wrong if it cannot take it.

    Raises:
        CalibrationError: If the model fails on the batch, or its output is not a finite floating-point tensor.
    """
    try:
        output = run_model(model, batch)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(
            f"{type(model).__name__} cannot take a calibration batch of {describe(batch)} "
            f"({type(error).__name__}: {error}); "
            "a batch must be a tensor, a tuple whose first item is the input, or a dict of forward's arguments."
        ) from error
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError(
            f"{type(model).__name__} returns NaN or infinite outputs on the first calibration batch."
        )
    return output


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = [p.name for p in named if p.default is p.empty]
        if all(name in batch for name in required) and any(p.name in batch for p in named):
            return (), {p.name: batch[p.name] for p in named if p.name in batch}
        return (batch,), {}
    if isinstance(batch, (tuple, list)):
        return (batch[0],), {}
    return (batch,), {}


def _output_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0 else None


def describe(batch: Any) -> str:
    """The structure of a batch in a few words, for error messages.

    Example:
        >>> describe((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
        'tuple(float32[2, 3], int64[2])'
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "dict(" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + ")"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__}(" + ", ".join(describe(x) for x in batch) + ")"
    return type(batch).__name__


def batch_size(batch: Any) -> int:
    """Number of samples: the length of the first tensor in the batch, 0 if there is none."""
    tensors = _tensors(batch)
    first = next(tensors, None)
    return len(first) if first is not None and first.ndim else 0


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


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
            taken.append(batch if last - first == size else _cut(batch, size, slice(first, last)))
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


def _cut(batch: Any, size: int, part: slice) -> Any:
    return tree_map_only(Tensor, lambda t: t[part] if t.ndim and len(t) == size else t, batch)


def calibration_batches(batches: Iterable[Any], samples: int, device: torch.device | None = None) -> list[Any]:
    """Collect up to ``samples`` samples and check that they can be used.

    Args:
        batches: Re-iterable batches, such as a list or a DataLoader.
        samples: How many samples to keep.
        device: Where to move the tensors; left where they are by default.

    Returns:
        The batches, as normal tensors that autograd may use.

    Raises:
        CalibrationError: If ``batches`` is an iterator that can be read once only, holds no sample, or holds NaN or
            infinite inputs.

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
    seen = 0
    for index, batch in enumerate(batches):
        size = batch_size(batch)
        if size == 0:
            raise CalibrationError(f"Calibration batch {index} holds no samples: {describe(batch)}.")
        for tensor in _tensors(batch):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(f"Calibration batch {index} holds NaN or infinite values: {describe(batch)}.")
        kept.append(tree_map_only(Tensor, lambda t: t.detach().clone().to(device), batch))
        seen += size
        if seen >= samples:
            break
    if not kept:
        raise CalibrationError("batches is empty; quantization needs at least one calibration batch.")
    return take_samples(kept, samples)
