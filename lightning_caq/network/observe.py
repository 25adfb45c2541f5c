"""Observation: what a loss does with a batch, which tells how a network is run and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_caq.network.arguments import Arguments
from lightning_caq.network.outputs import Kind
from lightning_caq.utilities.structures import Path, children

Loss = Callable[[nn.Module, Any], Tensor]

LOSSES: dict[Any, Kind] = {
    F.cross_entropy: "classes",
    F.nll_loss: "classes",
    F.kl_div: "classes",
    F.multi_margin_loss: "classes",
    F.binary_cross_entropy: "values",
    F.binary_cross_entropy_with_logits: "values",
    F.mse_loss: "values",
    F.l1_loss: "values",
    F.smooth_l1_loss: "values",
    F.huber_loss: "values",
    F.gaussian_nll_loss: "values",
    F.poisson_nll_loss: "values",
    F.cosine_embedding_loss: "values",
    F.triplet_margin_loss: "values",
}
"""What the first argument of a loss function is."""


@dataclass(frozen=True)
class LossCall:
    """A call of a loss function.

    Attributes:
        name: Its name.
        kind: What its first argument is.
        inputs: Its first argument.
        class_axis: Where classes lie in it; ``None`` for values.
    """

    name: str
    kind: Kind
    inputs: Tensor
    class_axis: int | None


@dataclass
class Observation:
    """What was seen while a loss was computed.

    Attributes:
        arguments: What of the batch ``forward`` was called with; ``None`` if it was not called, or with other things.
        losses: The loss functions that were called.
    """

    arguments: Arguments | None = None
    losses: list[LossCall] = field(default_factory=list)


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[LossCall] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = args[0] if args else kwargs.get("input")
        if func in LOSSES and isinstance(inputs, Tensor):
            kind: Kind = LOSSES[func]
            axis = (0 if inputs.ndim == 1 else 1) if kind == "classes" and func is not F.kl_div else None
            axis = inputs.ndim - 1 if func is F.kl_div else axis
            self.losses.append(LossCall(func.__name__, kind, inputs, axis))
        return func(*args, **kwargs)


def observe(model: nn.Module, batch: Any, loss: Loss) -> Observation:
    """Compute a loss once and note how it runs the network, and which loss functions it calls.

    Args:
        model: The network.
        batch: A batch.
        loss: Its loss of a model and a batch.

    Example:
        >>> found = observe(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4).long()),
        ...                 lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
        >>> found.arguments.places, found.losses[0].kind
        (((0,),), 'classes')
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    handle, watcher = model.register_forward_pre_hook(before, with_kwargs=True), _Watcher()
    try:
        with watcher, torch.no_grad():
            loss(model, batch)
    finally:
        handle.remove()
    return Observation(_arguments(batch, *calls[0]) if len(calls) == 1 else None, watcher.losses)


def _arguments(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Where in the batch the arguments of a call lie; ``None`` if one of them lies nowhere."""
    paths: dict[int, Path] = {}
    _note(batch, (), paths)
    given = {name: value for name, value in kwargs.items() if value is not None}
    if any(id(value) not in paths for value in (*args, *given.values())) or not (args or given):
        return None
    return Arguments(
        tuple(paths[id(value)] for value in args), tuple((name, paths[id(x)]) for name, x in given.items())
    )


def _note(value: Any, path: Path, paths: dict[int, Path]) -> None:
    if isinstance(value, Tensor) or children(value):
        paths.setdefault(id(value), path)
    for key, item in children(value):
        _note(item, (*path, key), paths)


def loss_route(loss: Loss) -> Callable[[nn.Module, Any], Any]:
    """Run a network by its loss, for a module without ``forward``: its outputs are what its loss functions are given.

    If it calls none that is known, its output is the loss itself.

    Example:
        >>> route = loss_route(lambda model, batch: F.mse_loss(model(batch), batch))
        >>> [t.shape for t in route(nn.Linear(2, 2), torch.zeros(3, 2))]
        [torch.Size([3, 2])]
    """

    def route(model: nn.Module, batch: Any) -> Any:
        with _Watcher() as watcher:
            value = loss(model, batch)
        return tuple(call.inputs for call in watcher.losses) or (value.reshape(1),)

    return route
