"""Forward: how a network is run on a batch, and how a batch is cut into samples."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_caq.errors import CalibrationError
from lightning_caq.network.arguments import Arguments, possible_arguments
from lightning_caq.network.outputs import Head, Mask, Outputs, default_heads, opened, read_outputs
from lightning_caq.utilities.isolation import seeded
from lightning_caq.utilities.structures import Path, describe, map_tensors, named_tensors, tensors
from lightning_caq.utilities.unseen import gradients_through

Route = Callable[[nn.Module, Any], Any]
"""What runs a network on a batch and gives what it returns."""


@dataclass(frozen=True)
class Forward:
    """How a network is run, and what is known of the batches it takes.

    Attributes:
        route: What runs it.
        heads: What its outputs mean.
        axes: Where samples lie in each tensor of a batch; tensors that are not named are the same for all samples.
        cuttable: Whether samples can be taken out of a batch; if not, a batch is one sample.
        inputs: Where the tensors lie that the network is given.
        padding: What tells which positions of the inputs are padding.
        through: Whether gradients pass where the network cuts them off, by ``no_grad`` or ``detach``.
        random: Whether the network draws random numbers: each run then starts from the same seed.
        notes: What the user should know.
    """

    route: Route
    heads: tuple[Head, ...]
    axes: Mapping[Path, int] = field(default_factory=dict)
    cuttable: bool = True
    inputs: frozenset[Path] = frozenset()
    padding: Mask | None = None
    through: bool = False
    random: bool = False
    notes: tuple[str, ...] = ()

    def raw(self, model: nn.Module, data: Any) -> Any:
        """What the network returns for a batch, as it is."""
        through = gradients_through() if self.through else nullcontext()
        with quiet(model), seeded() if self.random else nullcontext(), through:
            return opened(self.route(model, data))

    def size(self, data: Any) -> int:
        """Number of samples in a batch."""
        if not self.cuttable:
            return 1
        found = dict(named_tensors(data))
        return next((found[path].shape[axis] for path, axis in self.axes.items() if path in found), 0)


@dataclass(frozen=True)
class Batch:
    """A batch that knows how a network is run on it.

    Attributes:
        data: The batch as the user's loader gave it.
        forward: How the network is run.
    """

    data: Any
    forward: Forward

    @property
    def size(self) -> int:
        """Number of samples; 1 where the batch cannot be cut."""
        return self.forward.size(self.data)

    @property
    def padding(self) -> Tensor | None:
        """Which positions of the inputs count, shape (samples, positions), bool; ``None`` where all do."""
        mask = self.forward.padding
        tensor = dict(named_tensors(self.data)).get(mask.path) if mask is not None else None
        if mask is None or tensor is None:
            return None
        keep = mask.keep(tensor)
        return None if bool(keep.all()) else keep

    def run(self, model: nn.Module) -> Outputs:
        """The network's outputs."""
        returned = self.forward.raw(model, self.data)
        return read_outputs(self.forward.heads, returned, self.size, self.data)

    def take(self, samples: slice | Sequence[int]) -> Batch:
        """A batch of some of the samples; of a batch that cannot be cut, the whole."""
        if not self.forward.cuttable:
            return self
        return replace(self, data=cut(self.data, self.forward.axes, samples))


def cut(data: Any, axes: Mapping[Path, int], samples: slice | Sequence[int]) -> Any:
    """Some samples of a batch.

    Args:
        data: The batch.
        axes: Where samples lie in each tensor; others are left as they are.
        samples: Which.

    Example:
        >>> import torch
        >>> cut({"x": torch.arange(6).reshape(2, 3), "n": 5}, {("x",): 1}, [2, 0])
        {'x': tensor([[2, 0],
                [5, 3]]), 'n': 5}
    """

    def part(path: Path, tensor: Tensor) -> Tensor:
        if path not in axes:
            return tensor
        place: tuple[Any, ...] = (
            *(slice(None),) * axes[path],
            samples if isinstance(samples, slice) else list(samples),
        )
        return tensor[place]

    return map_tensors(part, data)


def run_model(model: nn.Module, batch: Any) -> Outputs:
    """Run a network on a batch.

    Args:
        model: The network.
        batch: A ``Batch``; or a batch as it is, handed over in the way that is likeliest (``possible_arguments``), its
            samples along the first axis of its tensors.

    Returns:
        All floating-point tensors that the network returns.

    Raises:
        CalibrationError: If it returns none.

    Example:
        >>> import torch
        >>> run_model(nn.Linear(2, 1), (torch.zeros(5, 2), torch.zeros(5))).values.shape
        torch.Size([5, 1])
    """
    if isinstance(batch, Batch):
        return batch.run(model)
    returned, heads, samples = _run_unbound(model, batch)
    return read_outputs(heads, returned, samples, batch)


def returned_tensors(model: nn.Module, batch: Any) -> list[tuple[Tensor, float]]:
    """The tensors that a network returns for a batch, each with how much a change of it counts as a distance at most.

    Example:
        >>> import torch
        >>> returned_tensors(nn.Identity(), torch.zeros(1, 2))
        [(tensor([[0., 0.]]), 1.0)]
    """
    if isinstance(batch, Batch):
        returned, heads = batch.forward.raw(model, batch.data), batch.forward.heads
    else:
        returned, heads, _ = _run_unbound(model, batch)
    found = dict(named_tensors(returned))
    return [(found[h.path], 1.0 / h.unit / (1.0 if h.std is None else float(h.std.min()))) for h in heads]


def with_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same batch with every tensor replaced."""
    if isinstance(batch, Batch):
        return replace(batch, data=with_tensors(function, batch.data))
    return map_tensors(lambda path, tensor: function(tensor), batch)


def _run_unbound(model: nn.Module, batch: Any) -> tuple[Any, tuple[Head, ...], int]:
    """What a network returns for a batch of which nothing is known, what it means, and the number of samples."""
    args, kwargs = next(possible_arguments(model, batch)).of(batch)
    with quiet(model):
        returned = opened(model(*args, **kwargs))
    first = next(iter(tensors((args, kwargs))), None)
    samples = len(first) if first is not None and first.ndim else 1
    heads = default_heads(returned, samples)
    if not heads:
        raise CalibrationError(no_outputs(model, batch))
    return returned, heads, samples


def no_outputs(model: nn.Module, batch: Any) -> str:
    """What to say of a network whose outputs cannot be used."""
    return (
        f"{type(model).__name__}.forward returned no floating-point tensor for a batch of {describe(batch)}; return "
        "the output tensor or a structure that holds it, or give forward_fn, a function of (module, batch) that does."
    )


def arguments_route(arguments: Arguments) -> Route:
    """Run a network by calling it with some arguments of the batch."""

    def route(model: nn.Module, data: Any) -> Any:
        args, kwargs = arguments.of(data)
        return model(*args, **kwargs)

    return route


_quiet = threading.local()
_lock = threading.Lock()
_shadowed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_LOGGING = ("log", "log_dict")


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Let ``self.log`` of a LightningModule do nothing: outside of its loops it is an error or a warning.

    In this thread alone: a forward pass that waits in another one does not silence a validation in between.

    Example:
        >>> with quiet(nn.Linear(1, 1)):
        ...     pass
    """
    modules = [m for m in model.modules() if hasattr(type(m), "log_dict") and hasattr(type(m), "training_step")]
    _quiet.depth = getattr(_quiet, "depth", 0) + 1
    with _lock:
        for module in modules:
            _shadowed[module] = _shadowed.get(module, 0) + 1
            if _shadowed[module] == 1:
                vars(module).update({name: _Silenced(module, name) for name in _LOGGING})
    try:
        yield
    finally:
        _quiet.depth -= 1
        with _lock:
            for module in modules:
                _shadowed[module] -= 1
                if not _shadowed[module]:
                    del _shadowed[module]
                    for name in _LOGGING:
                        vars(module)[name].remove()


class _Silenced:
    """Stands for a logging method of a module: does nothing where it is quiet, else what the method does."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._attributes, self._name = vars(module), name
        self._own = {name: self._attributes[name]} if name in self._attributes else {}
        self._call = getattr(module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Log, unless it is quiet."""
        return None if getattr(_quiet, "depth", 0) else self._call(*args, **kwargs)

    def remove(self) -> None:
        """Put back what the module had."""
        self._attributes.pop(self._name)
        self._attributes.update(self._own)
