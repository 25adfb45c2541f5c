"""Structures: the tensors in a batch or in outputs, whatever containers hold them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Path = tuple[Any, ...]
"""Where something lies in a structure: keys, indices and names of fields, from the outside in."""


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_object(value: Any) -> bool:
    """Whether a value is an object of an unknown class that may hold tensors, such as a graph; functions are none."""
    known = isinstance(value, (Tensor, Mapping, tuple, list)) or is_record(value) or callable(value)
    return not known and bool(getattr(value, "__dict__", None) or getattr(value, "__slots__", None))


def children(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, each with its key, index or name of a field; nothing for what is no container.

    Example:
        >>> children({"x": 1}), children((5, 6)), children("text")
        ([('x', 1)], [(0, 5), (1, 6)], [])
    """
    if isinstance(value, PackedSequence):
        return [(0, value.data)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if is_record(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return []


def named_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor of a structure, and where it lies.

    Example:
        >>> import torch
        >>> [path for path, _ in named_tensors({"a": torch.zeros(1), "b": [torch.zeros(2), "text"]})]
        [('a',), ('b', 0)]
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, item in children(value):
        yield from named_tensors(item, (*path, key))


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a structure."""
    return [tensor for _, tensor in named_tensors(value)]


def map_tensors(function: Callable[[Path, Tensor], Any], value: Any, path: Path = ()) -> Any:
    """The same structure with every tensor replaced; containers that were given stay as they are.

    Mappings that cannot be copied and changed become dicts. Objects of unknown classes are handed on as they are.

    Args:
        function: Called with where a tensor lies, and the tensor.
        value: The structure.
        path: Where it lies itself.

    Example:
        >>> import torch
        >>> map_tensors(lambda path, t: len(t), {"a": torch.zeros(3), "b": ("text", torch.zeros(2))})
        {'a': 3, 'b': ('text', 2)}
    """
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function((*path, 0), value.data))
    new = {key: map_tensors(function, item, (*path, key)) for key, item in children(value)}
    if isinstance(value, Mapping):
        return _mapping(value, new)
    if isinstance(value, (tuple, list)):
        items = list(new.values())
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_record(value):
        changed = copy.copy(value)
        for name, item in new.items():
            object.__setattr__(changed, name, item)  # frozen ones too
        return changed
    return value


def _mapping(value: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return new
    try:
        changed: Any = copy.copy(value)
        for key, item in new.items():
            changed[key] = item
    except (TypeError, AttributeError, NotImplementedError):
        return new
    return changed


def describe(value: Any) -> str:
    """A structure in a few words, for messages.

    Example:
        >>> import torch
        >>> describe((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
        'tuple(float32[2, 3], int64[2])'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        name = "dict" if type(value) is dict else type(value).__name__
        return f"{name}(" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + ")"
    if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        return f"{type(value).__name__}(" + ", ".join(describe(x) for x in value) + ")"
    if is_record(value):
        return f"{type(value).__name__}(" + ", ".join(f"{k}: {describe(v)}" for k, v in children(value)) + ")"
    return type(value).__name__


def path_name(path: Path) -> str:
    """Where something lies, in words.

    Example:
        >>> path_name(("boxes", 0)), path_name(())
        ('boxes.0', '')
    """
    return ".".join(map(str, path))
