"""Cutting: whether samples can be taken out of a batch, found by running one, two and all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_caq.network.forward import cut
from lightning_caq.network.outputs import output_tensors
from lightning_caq.utilities.structures import Path, named_tensors

_TOLERANCE = 1e-3  # of the largest output; sums in another order differ by far less

Axes = Mapping[Path, int]
Run = Callable[[Any], Any]


def find_axes(
    run: Run,
    data: Any,
    returned: Any,
    passed: Callable[[Path], bool],
    failures: tuple[type[Exception], ...],
    *,
    random: bool = False,
) -> tuple[dict[Path, int], dict[Path, int]] | None:
    """Where samples lie in a batch and in what a network returns for it.

    Guesses are tried, the likeliest first: that samples lie along the first axis of the tensors, or along the second of
    some. A guess is right if one sample, and two in another order, give what they give among all the others.

    Args:
        run: Runs the network on a batch.
        data: A batch.
        returned: What the network returns for it.
        passed: Whether what lies at a path is passed to the network.
        failures: What the network may raise where a guess is wrong.
        random: Whether outputs cannot be compared, as the network draws random numbers.

    Returns:
        The axis of every tensor that holds samples, of the batch and of what is returned; ``None`` if the batch cannot
        be cut: outputs depend on other samples, or tensors belong together in another way, as nodes and edges do.

    Example:
        >>> x, every = torch.randn(5, 3), lambda path: True
        >>> find_axes(lambda x: x.cumsum(0), x, x.cumsum(0), every, (RuntimeError,))
        ({(): 1}, {(): 1})
        >>> find_axes(lambda x: x - x.mean(), x, x - x.mean(), every, (RuntimeError,)) is None
        True
    """
    tensors = dict(named_tensors(data))
    whole = dict(output_tensors(returned))
    for size, axes in _guesses({path: t for path, t in tensors.items() if t.ndim}, passed):
        if any(_may_point(t, size) for path, t in tensors.items() if passed(path) and path not in axes):
            continue
        try:
            found = _check(run, data, axes, size, whole, random=random)
        except failures:
            continue
        if found:
            return axes, found
    return None


def _guesses(tensors: Mapping[Path, Tensor], passed: Callable[[Path], bool]) -> Iterator[tuple[int, dict[Path, int]]]:
    inputs = [path for path in tensors if passed(path)] or list(tensors)
    seen: list[dict[Path, int]] = []
    for axis in (0, 1):
        sizes = [tensors[path].shape[axis] for path in inputs if tensors[path].ndim > axis]
        for size in dict.fromkeys(sorted(sizes, key=lambda s: -sizes.count(s) * (s > 1))):
            order = (axis, 1 - axis)
            whole = {p: d for p, t in tensors.items() if (d := _axis(t, size, order)) is not None}
            cut_inputs = [path for path in inputs if path in whole]
            # One of the tensors may have the length of the batch by chance.
            spared = [path for path in cut_inputs if len(cut_inputs) > 1] if len(cut_inputs) < 8 else []
            for left_out in (None, *spared):
                guess = {path: d for path, d in whole.items() if path != left_out}
                if guess and guess not in seen:
                    seen.append(guess)
                    yield size, guess


def _may_point(tensor: Tensor, size: int) -> bool:
    """Whether a tensor that is not cut may hold places in those that are, on a device that cannot refuse wrong ones."""
    whole = tensor.is_cuda and tensor.numel() > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool
    return whole and int(tensor.max()) < size


def _axis(tensor: Tensor, size: int, order: Sequence[int]) -> int | None:
    return next((d for d in order if tensor.ndim > d and tensor.shape[d] == size), None)


def _check(
    run: Run, data: Any, axes: Axes, size: int, whole: Mapping[Path, Tensor], *, random: bool
) -> dict[Path, int] | None:
    """Where samples lie in the outputs, if the guess is right."""
    picks = [[size - 1], [size - 1, 0]]
    runs = [dict(output_tensors(run(cut(data, axes, pick)))) for pick in picks]
    found = {}
    for path, tensor in whole.items():
        if any(path not in part or part[path].ndim != tensor.ndim for part in runs):
            return None
        one, two = (part[path] for part in runs)
        scaling = [
            d for d in range(tensor.ndim)
            if one.shape[d] and two.shape[d] == 2 * one.shape[d] and tensor.shape[d] == size * one.shape[d]
        ]  # fmt: skip
        if len(scaling) == 1:
            (axis,) = scaling
        elif size == 1 and scaling:
            axis = scaling[0]
        elif not scaling and tensor.shape == one.shape == two.shape:
            continue  # the same for all samples, such as a table of positions
        else:
            return None
        each = one.shape[axis]
        places = [[s * each + i for s in pick for i in range(each)] for pick in picks]
        if not random and not all(
            _agree(part, tensor.index_select(axis, torch.tensor(place, device=tensor.device)))
            for part, place in zip((one, two), places, strict=True)
        ):
            return None
        found[path] = axis
    return found or None


def _agree(part: Tensor, whole: Tensor) -> bool:
    """Whether some samples give by themselves what they give among others, as far as both reach.

    Samples that are short by themselves are padded beside longer ones.
    """
    common = tuple(slice(0, min(a, b)) for a, b in zip(part.shape, whole.shape, strict=True))
    a, b = part[common].detach(), whole[common].detach()
    return bool(((a - b).abs() <= _TOLERANCE * b.abs().amax().clamp_min(1e-12)).all())
