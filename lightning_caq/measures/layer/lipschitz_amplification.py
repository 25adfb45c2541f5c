"""Amplification by Lipschitz constants, along the graph that one batch draws as it runs through the network.

Every tensor carries a bound on how much it changes when a layer's output changes: a function multiplies the bounds of
its inputs by its Lipschitz constant, and where paths join the bounds are added. A residual block has 1 + ∏ L. Torch
functions are watched while they run, so no tracing of the network is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_caq.errors import OptionError
from lightning_caq.measures.cost import Cost
from lightning_caq.measures.layer.constants import function_name, lipschitz_constants
from lightning_caq.measures.measurement import Measurement
from lightning_caq.measures.registry import Measure
from lightning_caq.network.batches import take_samples
from lightning_caq.network.forward import returned_tensors, with_tensors
from lightning_caq.network.hooks import watching
from lightning_caq.network.layers import Layer, layer_modules
from lightning_caq.profile import CurvatureProfile
from lightning_caq.utilities import seeding
from lightning_caq.utilities.structures import tensors

_INPUT = None
_SAMPLES = 2  # one alone might lose its axis to a squeeze()
# Functions that return no tensor and yet carry on what a tensor holds.
_LEAKS = frozenset({"item", "tolist", "numpy", "bool", "float", "int", "setitem"})

Gains = dict[str | None, float]


@dataclass(frozen=True)
class LipschitzAmplification:
    """Bounds on how much the network's output changes per change of something before it.

    Attributes:
        layers: A_i, layer name to the bound for a change of its output; 0 for a layer that no batch reaches; out/out.
        input: A_0, the bound for a change of the network's input, all its floating-point tensors taken together; 0
            where there are none, as with tokens; out/in.
    """

    layers: dict[str, float]
    input: float


def lipschitz_amplification(
    model: nn.Module, layers: Sequence[Layer], batch: Any, generator: torch.Generator
) -> LipschitzAmplification:
    """A_i = ∏_{j>i} L_j along each path from layer i's output to the network's, summed over paths (CAQ 2.3).

    L_j of linear maps (layers, pooling, means, slices) is σ_max of the map on tensors of the observed size, by Lanczos,
    its residual added; of batch-norm, activations, max-pooling and sums it is known in closed form. Of a layer that
    runs more than once the bounds of its calls are added. The bound holds for the weights as they are, and is loose:
    every map is taken at its worst direction.

    Args:
        model: The network, in eval mode. Frozen weights and inputs are fine.
        layers: The layers.
        batch: A batch; two samples of it are used.
        generator: Draws the starting vectors of Lanczos.

    Returns:
        A_i of every layer, and A_0.

    Raises:
        OptionError: If the network applies a function that has no known Lipschitz constant; the function and the module
            are named.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
        >>> _ = net[2].weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> from lightning_caq.network.layers import find_layers
        >>> x = torch.randn(8, 2)
        >>> bounds = lipschitz_amplification(net, find_layers(net, x), x, torch.Generator().manual_seed(0))
        >>> {name: round(gain, 3) for name, gain in bounds.layers.items()}
        {'0': 5.0, '2': 1.0}
    """
    names = {id(module): layer.name for layer in layers for module in layer_modules(model, layer)}
    modules = [module for module in model.modules() if id(module) in names]
    watcher = _Watcher(generator)
    with torch.enable_grad():
        # With a gradient on the input, whatever depends on it can be told from a constant.
        inputs = with_tensors(_differentiable, take_samples([batch], _SAMPLES)[0])
        for tensor in tensors(inputs):
            if tensor.is_floating_point():
                watcher.record(tensor, {_INPUT: 1.0})
        with watcher.naming(model), watching(modules, lambda m, x, y: watcher.start(names[id(m)], y)), watcher:
            returned = returned_tensors(model, inputs)
        # Distances of several outputs together are at most the sum of theirs.
        gains = _sum([(watcher.gains(tensor, "the network's output"), factor) for tensor, factor in returned])
    return LipschitzAmplification({layer.name: gains.get(layer.name, 0.0) for layer in layers}, gains.get(_INPUT, 0.0))


def _differentiable(tensor: Tensor) -> Tensor:
    """A copy that autograd sees and that may be changed in place, as a leaf may not."""
    return tensor.detach().clone().requires_grad_().clone() if tensor.is_floating_point() else tensor


class _Watcher(TorchFunctionMode):
    """Watches torch functions and gives every tensor that they return its bounds."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator
        # Keeps the tensors, so that no identity is used twice; the version tells of changes in place.
        self._known: dict[int, tuple[Tensor, int, Gains]] = {}
        self._modules: list[str] = []

    def record(self, tensor: Tensor, gains: Gains) -> None:
        self._known[id(tensor)] = (tensor, tensor._version, gains)

    def start(self, layer: str, output: Tensor) -> None:
        """A change of a layer's output begins here, beside those that come from further back."""
        self.record(output, _sum([(self.gains(output, "a layer"), 1.0), ({layer: 1.0}, 1.0)]))

    def gains(self, tensor: Tensor, reader: str) -> Gains:
        """The bounds of a tensor; none for a constant."""
        known = self._known.get(id(tensor))
        if known is None:
            if tensor.grad_fn is not None:
                self._fail(f"{reader} takes a tensor from a function that cannot be watched")
            return {}
        if known[1] != tensor._version:
            self._fail(f"{reader} takes a tensor that was changed in place through another view of it")
        return known[2]

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """While open, the module that is running is known by its name."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                title = f"'{name}' ({type(module).__name__})" if name else type(module).__name__

                def enter(*_: Any, title: str = title) -> None:
                    self._modules.append(title)

                def leave(*_: Any) -> None:
                    self._modules.pop()

                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        gains = [self.gains(x, f"'{name}'") for x in given]
        output = func(*args, **kwargs)
        results = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        moving = [(x, g) for x, g in zip(given, gains, strict=True) if g]
        constants: Sequence[float] | None = ()
        if moving and results:
            constants = lipschitz_constants(func, args, kwargs, [x for x, _ in moving], results[0], self._generator)
        if constants is None or (moving and not results and name in _LEAKS):
            self._fail(f"the Lipschitz constant of '{name}' is not known")
        joined = _sum([(g, c) for (_, g), c in zip(moving, constants, strict=bool(results))])
        for result in results:
            self.record(result, joined)
        return output

    def _fail(self, what: str) -> NoReturn:
        where = self._modules[-1] if self._modules else "the network"
        raise OptionError(
            f"The measure 'lipschitz_amplification' cannot be taken: {what}, in {where}; leave it out of needs, or ask "
            "for 'amplification', which is measured and takes any function."
        )


def _sum(parts: Sequence[tuple[Gains, float]]) -> Gains:
    total: Gains = {}
    for gains, constant in parts:
        for source, gain in gains.items():
            total[source] = total.get(source, 0.0) + constant * gain
    return total


def take(measurement: Measurement, profile: CurvatureProfile) -> CurvatureProfile:
    """A_i of every layer, and A_0."""
    draws = seeding.generator(measurement.seed, "lipschitz_amplification")
    bounds = lipschitz_amplification(measurement.model, measurement.layers, measurement.batches[0], draws)
    profile = replace(profile, input_lipschitz=bounds.input)
    return profile.with_rows(lambda row: replace(row, lipschitz_amplification=bounds.layers[row.name]))


MEASURE = Measure(
    "lipschitz_amplification",
    step="Lipschitz constants along the graph",
    take=take,
    cost=lambda extent: Cost(960 / extent.samples),  # on two samples, however many there are
)
