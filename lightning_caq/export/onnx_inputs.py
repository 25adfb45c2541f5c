"""Example inputs of an export: a tensor, a tuple, or a dict, nested perhaps, with a name for each of its tensors."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_unflatten

from lightning_caq.errors import ExportError

DynamicShapes = Mapping[str, Mapping[int, str]]
"""Name of an input to those of its dimensions that may vary, each with a name; dimensions of one name vary together."""


@dataclass(frozen=True)
class ExampleInputs:
    """What a network is called with.

    Attributes:
        args: Positional arguments of ``forward``.
        kwargs: Keyword arguments.
        named: Its tensors by name, in the order in which they are handed over.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Tensor]

    @property
    def example(self) -> Any:
        """The arguments as a user gives them."""
        if self.kwargs:
            return self.kwargs
        alone = self.args[0] if len(self.args) == 1 else None
        return alone if isinstance(alone, dict) else list(self.args)

    def with_tensors(self, change: Callable[[str, Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with something else in the place of each tensor."""
        leaves, tree = tree_flatten_with_path((self.args, self.kwargs))
        names = iter(self.named)
        new = [change(next(names), leaf) if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]
        args, kwargs = tree_unflatten(new, tree)
        return args, kwargs

    def enlarged(self, shapes: DynamicShapes) -> ExampleInputs:
        """The same with every dimension that may vary twice as long."""

        def twice(name: str, tensor: Tensor) -> Tensor:
            for axis in shapes.get(name, {}):
                tensor = torch.cat([tensor, tensor], axis)
            return tensor

        args, kwargs = self.with_tensors(twice)
        return ExampleInputs(args, kwargs, {name: twice(name, x) for name, x in self.named.items()})


def read_example(model: nn.Module, example: Any) -> ExampleInputs:
    """Arguments of a network, named after the parameters of ``forward`` and the keys of dicts.

    Args:
        model: The network.
        example: A tensor, a sequence of positional arguments, or a mapping: of keyword arguments where ``forward``
            takes them by their names, else the one argument. Arguments may be tensors, and sequences and mappings of
            such.

    Raises:
        ExportError: If something else is among them.

    Example:
        >>> list(read_example(nn.Bilinear(2, 2, 1), (torch.zeros(1, 2), torch.zeros(1, 2))).named)
        ['input1', 'input2']
    """
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        plain = {str(key): value for key, value in example.items()}
        if takes_any or plain.keys() <= by_keyword:
            kwargs = plain
        else:
            args = (plain,)
    else:
        args = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, Sequence) else ()
    args, kwargs = tree_map(lambda x: dict(x) if isinstance(x, Mapping) else x, (args, kwargs))
    roots = [positional[i] if i < len(positional) else f"input_{i}" for i in range(len(args))]
    named = _named([*zip(roots, args, strict=True), *kwargs.items()])
    if not named:
        raise ExportError(
            "example_input must be a tensor, a tuple of forward's arguments, or a dict of them by name; every leaf of "
            "it a tensor or None."
        )
    return ExampleInputs(args, kwargs, named)


def check_shapes(inputs: ExampleInputs, shapes: DynamicShapes | None) -> None:
    """Refuse dimensions that the inputs do not have.

    Raises:
        ExportError: If an input or a dimension does not exist, or a name is no identifier.
    """
    for name, axes in (shapes or {}).items():
        if name not in inputs.named:
            known = ", ".join(map(repr, inputs.named))
            raise ExportError(f"dynamic_shapes names the input {name!r}; the inputs are {known}.")
        dims = inputs.named[name].ndim
        for axis, title in axes.items():
            if not (isinstance(axis, int) and 0 <= axis < dims and isinstance(title, str) and title.isidentifier()):
                raise ExportError(
                    f"dynamic_shapes gives {name!r} the dimension {axis!r}: {title!r}; it has dimensions 0 to "
                    f"{dims - 1}, and each takes a name such as 'length'."
                )


def _named(arguments: Sequence[tuple[str, Any]]) -> dict[str, Tensor]:
    """The tensors of arguments by the shortest name that is theirs alone: a key, or the argument and the key."""
    paths: list[tuple[list[str], Tensor]] = []
    for root, argument in arguments:
        for path, leaf in tree_flatten_with_path(argument)[0]:
            if leaf is None:
                continue
            if not isinstance(leaf, Tensor):
                raise ExportError(
                    f"example_input must be a tensor, a tuple or a dict of tensors, nested perhaps; {root!r} holds a "
                    f"{type(leaf).__name__}."
                )
            paths.append(([root, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)], leaf))
    last = Counter(path[-1] for path, _ in paths)
    return {
        path[-1] if last[path[-1]] == 1 and not path[-1].isdigit() else "_".join(path): leaf for path, leaf in paths
    }
