"""Arguments: which of ``forward``'s arguments a batch fills."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.utilities.structures import children, is_record

Parameter = inspect.Parameter

_LABELS = ("label", "labels", "target", "targets", "y", "gt", "ground_truth", "y_true")
_WHOLE_NUMBERS = ("id", "len", "index", "idx", "pos", "type", "token", "word", "edge", "batch", "mask", "step", "time")


@dataclass(frozen=True)
class Arguments:
    """One way to hand a batch to ``forward``: where in the batch each argument lies.

    Attributes:
        places: Paths of the arguments that are passed by place; the empty path is the whole batch.
        names: Paths of those that are passed by keyword, by name.
        unpacked: Path of a mapping whose entries are all passed by keyword, if there is one.
    """

    places: tuple[tuple[Any, ...], ...] = ()
    names: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    unpacked: tuple[Any, ...] | None = None

    def of(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a batch, by place and by keyword.

        Example:
            >>> Arguments(places=((0,),), names=(("mask", (1, "m")),)).of((5, {"m": 6}))
            ((5,), {'mask': 6})
        """
        args = tuple(_at(batch, path) for path in self.places)
        kwargs = {name: _at(batch, path) for name, path in self.names if _has(batch, path)}
        if self.unpacked is not None:
            kwargs |= dict(_at(batch, self.unpacked).items())
        return args, kwargs

    def uses(self, path: tuple[Any, ...]) -> bool:
        """Whether what lies at a path of the batch is passed."""
        used = [*self.places, *(place for _, place in self.names)]
        used += [self.unpacked] if self.unpacked is not None else []
        return any(path[: len(place)] == place for place in used)

    def name_of(self, path: tuple[Any, ...], model: nn.Module) -> str:
        """The name of the argument, or of the entry, that what lies at a path is passed as."""
        for name, place in self.names:
            if path == place:
                return name
        if path in self.places:
            named = [p.name for p in _parameters(model) if p.kind is not Parameter.VAR_POSITIONAL]
            index = self.places.index(path)
            return named[index] if index < len(named) else ""
        return str(path[-1]) if path and isinstance(path[-1], str) else ""


def possible_arguments(model: nn.Module, batch: Any) -> Iterator[Arguments]:
    """The ways in which a batch may be meant, the likeliest first.

    Of a mapping, a dataclass or a named tuple the entries that ``forward`` names are passed; of a mapping, where it
    takes ``**inputs``, all. Of a tuple as many leading items as ``forward`` takes, or the items of a tuple that comes
    first. An argument with a default is filled only where an item is left behind it, which then is the label, and not
    with what looks like a label itself.

    Args:
        model: The network.
        batch: A batch.

    Example:
        >>> next(possible_arguments(nn.Linear(1, 1), (torch.zeros(2, 1), torch.zeros(2)))).places
        ((0,),)
    """
    parameters = _parameters(model)
    seen = set()
    for way in _ways(parameters, batch, ()):
        if way not in seen:
            seen.add(way)
            yield way


def _parameters(model: nn.Module) -> list[Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return [Parameter("args", Parameter.VAR_POSITIONAL)]


def _ways(parameters: list[Parameter], batch: Any, path: tuple[Any, ...]) -> Iterator[Arguments]:
    named = isinstance(batch, Mapping) or is_record(batch) or hasattr(batch, "_fields")
    if named:
        yield from _by_name(parameters, batch, path)
    if isinstance(batch, (tuple, list)):
        yield from _by_place(parameters, batch, path)
        if path == () and len(batch) and children(batch[0]) and not isinstance(batch[0], (str, bytes)):
            yield from _ways(parameters, batch[0], (0,))
        if path == () and not hasattr(batch, "_fields"):
            yield Arguments(places=((),))
        return
    yield Arguments(places=(path,))
    if not named and not isinstance(batch, Tensor):  # an object with attributes, such as a graph
        yield from _by_name(parameters, batch, path)


def _by_name(parameters: list[Parameter], batch: Any, path: tuple[Any, ...]) -> Iterator[Arguments]:
    taken = [p for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
    required = [p.name for p in taken if p.default is p.empty]
    names = tuple((p.name, (*path, p.name)) for p in taken if _has(batch, (p.name,)))
    if names and all(_has(batch, (name,)) for name in required):
        yield Arguments(names=names)
    elif not required and isinstance(batch, Mapping) and any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        yield Arguments(unpacked=path)


def _by_place(parameters: list[Parameter], batch: Any, path: tuple[Any, ...]) -> Iterator[Arguments]:
    placed = [p for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in placed)
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        most, least = max(len(batch) - 1, 1), max(least, 1)
    else:
        most = max(least, 1)
        while most < len(placed) and _fills(placed[most], batch, most, inside=bool(path)):
            most += 1
    least = max(least, 1)
    for count in range(min(most, len(batch)), 0, -1):
        if count >= least:
            yield Arguments(places=tuple((*path, i) for i in range(count)))


def _fills(parameter: Parameter, batch: Any, index: int, *, inside: bool) -> bool:
    """Whether an item is meant for an argument that has a default."""
    if index >= len(batch) or parameter.name.lower() in _LABELS:
        return False
    item, name = batch[index], parameter.name.lower()
    whole = isinstance(item, Tensor) and not item.is_floating_point() and item.dtype != torch.bool
    if whole and not any(part in name for part in _WHOLE_NUMBERS):
        return False
    if index + 1 < len(batch) or inside:
        return True  # what follows is the label
    return isinstance(item, Tensor) and "mask" in name and not whole


def _has(batch: Any, path: tuple[Any, ...]) -> bool:
    try:
        _at(batch, path)
    except (KeyError, IndexError, AttributeError, TypeError):
        return False
    return True


def _at(batch: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and not isinstance(key, str)):
            batch = batch[key]
        else:
            batch = getattr(batch, key)
    return batch
