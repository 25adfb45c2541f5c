"""What is deployed: the weights that calibration batches reach, and which of them stay in floating point.

Teachers, discriminators, averaged copies and the networks of metrics lie in the module beside what is deployed. No
calibration batch reaches them, so they count in no size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_caq.errors import OptionError
from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import Layer, layer_sizes, layer_weight, matches, quantizable_layers
from lightning_caq.sizes import FLOAT_BITS, LayerSizes

_LOOKS = {"T", "mT", "H", "mH", "data", "real"}  # properties that give a weight's values; others tell its shape or type


@dataclass(frozen=True)
class Part:
    """Weights that are not quantized.

    Attributes:
        name: The parameter, or the module of torch that holds it.
        weights: How many there are.
        kind: The class of such a module; empty for a parameter of the user's own modules.
    """

    name: str
    weights: int
    kind: str = ""


@dataclass(frozen=True)
class Deployed:
    """Which weights of a network are deployed; biases and the scales of norms count as no weights.

    Attributes:
        layers: The layers to quantize.
        left: What is deployed and stays in floating point, though nobody asked for that.
        excluded: What is deployed and stays in floating point since ``include`` and ``exclude`` leave it out.
        outside: What is not deployed.
        memory: Bits that the deployed weights take in memory.
        unquantized_memory: Bits of those that stay in floating point.
    """

    layers: tuple[Layer, ...]
    left: tuple[Part, ...]
    excluded: tuple[Part, ...]
    outside: tuple[Part, ...]
    memory: int = 0
    unquantized_memory: int = 0

    @property
    def unquantized(self) -> int:
        """Weights that are deployed in floating point."""
        return sum(part.weights for part in (*self.left, *self.excluded))

    @property
    def weights(self) -> int:
        """Weights that are deployed."""
        return sum(layer.weights for layer in self.layers) + self.unquantized

    @property
    def sizes(self) -> LayerSizes:
        """What a budget needs to know."""
        sizes = layer_sizes(self.layers, self.unquantized)
        if self.memory == FLOAT_BITS * self.weights:
            return sizes
        return replace(sizes, memory=self.memory, unquantized_memory=self.unquantized_memory)


def find_deployed(
    model: nn.Module,
    asked: Sequence[Layer],
    batches: Sequence[Any],
    *,
    patterns: Sequence[str] | None = None,
    widths: Mapping[int, int] | None = None,
) -> Deployed:
    """Tell what is deployed from what is not.

    Args:
        model: The network.
        asked: The layers that ``include`` and ``exclude`` leave.
        batches: The calibration batches; all are run.
        patterns: Names or shell patterns of the parameters and modules that are deployed; by default those that a batch
            reaches: a module that is called, or a parameter that an operator is given.
        widths: Bits that a number of each parameter takes in memory, by the parameter's identity, from
            ``stored_widths``; float32 by default.

    Raises:
        OptionError: If a pattern matches nothing.

    Example:
        >>> class Student(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.teacher = nn.Linear(2, 3), nn.Linear(2, 50)
        ...     def forward(self, x):
        ...         return self.net(x)
        >>> from lightning_caq.network.layers import find_layers
        >>> net, batches = Student(), [torch.zeros(1, 2)]
        >>> find_deployed(net, find_layers(net, batches[0]), batches).outside
        (Part(name='teacher.weight', weights=100, kind='Linear'),)
    """
    inside = reached(model, batches) if patterns is None else _matching(model, patterns)
    quantized = [layer for layer in asked if layer.calls and id(layer_weight(model, layer)) in inside]
    kept = {id(layer_weight(model, layer)) for layer in quantized}
    wanted = {id(layer_weight(model, layer)) for layer in asked}
    known = {id(layer_weight(model, layer)) for layer in quantizable_layers(model)}
    widths = widths or {}
    memory = {True: 0, False: 0}
    left: list[tuple[str, Tensor]] = []
    excluded: list[tuple[str, Tensor]] = []
    outside: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        quantizing = id(parameter) in kept
        if quantizing or id(parameter) in inside:
            memory[quantizing] += parameter.numel() * widths.get(id(parameter), FLOAT_BITS)
        if quantizing:
            continue
        if id(parameter) not in inside:
            outside.append((name, parameter))
        elif id(parameter) in known - wanted:
            excluded.append((name, parameter))
        else:
            left.append((name, parameter))
    return Deployed(
        layers=tuple(quantized),
        left=_parts(model, left),
        excluded=_parts(model, excluded),
        outside=_parts(model, outside),
        memory=memory[True] + memory[False],
        unquantized_memory=memory[False],
    )


def stored_widths(model: nn.Module) -> dict[int, int]:
    """Bits that a number of each parameter takes in memory, by the parameter's identity.

    Example:
        >>> set(stored_widths(nn.Linear(2, 2).bfloat16()).values())
        {16}
    """
    return {id(p): 8 * p.element_size() for p in model.parameters() if not is_lazy(p)}


def reached(model: nn.Module, batches: Sequence[Any]) -> set[int]:
    """Identities of the parameters that batches reach: those that an operator is given, and those of called modules.

    Modules are watched beside operators, as what goes on in compiled code and in autograd functions of the user's own
    is hidden from Python.
    """
    given = _Given()
    with _called(model) as modules, given, torch.no_grad():
        for batch in batches:
            run_model(model, batch)
    return given.parameters | {id(parameter) for module in modules for parameter in _own(module)}


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that belong to a module that is called, those of compiled children whole."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, torch.jit.ScriptModule):
            yield from child.parameters()


@contextmanager
def _called(model: nn.Module) -> Iterator[set[nn.Module]]:
    """While open, the modules that are called are noted."""
    called: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            handle = module.register_forward_pre_hook(lambda module, args: called.add(module))
            stack.callback(handle.remove)
        yield called


class _Given(TorchFunctionMode):
    """While it is entered, the parameters that operators are given are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__" or func.__self__.__name__ in _LOOKS:
            self.parameters |= {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter)}
        return func(*args, **kwargs)


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    """Identities of the parameters that patterns name, themselves or by a module that holds them."""
    holders = {name: _with_holders(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    exact = {name for names in holders.values() for name in names}
    found: set[int] = set()
    for pattern in patterns:
        is_name = pattern in exact
        named = [x for x, names in holders.items() if (pattern in names if is_name else matches(names, pattern))]
        if not named:
            tops = ", ".join(f"'{name}'" for name, _ in model.named_children())
            raise OptionError(f"deployed pattern '{pattern}' matches no parameter or module; the modules are {tops}.")
        found |= {id(model.get_parameter(name)) for name in named}
    return found


def _with_holders(name: str) -> tuple[str, ...]:
    """A parameter's name and those of the modules around it.

    Example:
        >>> _with_holders("a.b.weight")
        ('a.b.weight', 'a.b', 'a')
    """
    parts = name.split(".")
    return tuple(".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _parts(model: nn.Module, parameters: Sequence[tuple[str, Tensor]]) -> tuple[Part, ...]:
    """Parameters, those of one module of torch together, the largest first."""
    found: dict[str, Part] = {}
    for name, parameter in parameters:
        part = _part(model, name, parameter.numel())
        weights = part.weights + (found[part.name].weights if part.name in found else 0)
        found[part.name] = Part(part.name, weights, part.kind)
    return tuple(sorted(found.values(), key=lambda part: -part.weights))


def _part(model: nn.Module, name: str, weights: int) -> Part:
    holder, _, _ = name.rpartition(".")
    if ".parametrizations." in f".{holder}":
        module, _, rest = f".{name}".partition(".parametrizations.")
        return Part(f"{module}.{rest.split('.')[0]}".lstrip("."), weights, "parametrized")
    module_of = model.get_submodule(holder)
    kind = type(module_of)
    several = sum(p.ndim > 1 for p in module_of.parameters(recurse=False)) > 1
    of_torch = kind.__module__.startswith("torch.nn.modules") and "container" not in kind.__module__
    if of_torch and several:
        return Part(holder or kind.__name__, weights, kind.__name__)
    return Part(name, weights, kind.__name__ if of_torch else "")
