"""Calibration of activations: the inputs of the layers are looked at, and each gets its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.batches import batch_size
from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import Layer, layer_modules
from lightning_caq.network.stepped_passes import Call, SteppedPasses
from lightning_caq.quantizers.grids.activations import InputGrid, change_first, fit_input_grid
from lightning_caq.utilities.seeding import generator

_VALUES = 2**17  # kept of each layer's inputs, 0.5 MB


@contextmanager
def rounded_inputs(model: nn.Module, layers: Sequence[Layer], grids: Mapping[str, InputGrid]) -> Iterator[None]:
    """While open, the inputs of some layers are rounded.

    Args:
        model: The network, its modules of any class.
        layers: The layers.
        grids: Layer name to grid; layers that are not named take their inputs as they are. It may grow meanwhile.

    Example:
        >>> net = nn.Identity()
        >>> with rounded_inputs(net, [Layer("", "linear", (1, 1), modules=("",))], {"": InputGrid(8, 1.0, 0)}):
        ...     net(torch.tensor([0.4, 0.6]))
        tensor([0., 1.])
    """

    def hook(name: str) -> Callable[..., Any]:
        def rounded(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return change_first(grids[name].round, args, kwargs) if name in grids else None

        return rounded

    with ExitStack() as stack:
        for layer in layers:
            for module in layer_modules(model, layer):
                handle = module.register_forward_pre_hook(hook(layer.name), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def sample_inputs(model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any]) -> dict[str, Tensor]:
    """A random sample of what goes into each layer, with the smallest and the largest value among it.

    The network is run up to the last of the layers. At most about 2^17 values a layer are kept, so memory is bounded,
    whatever the number of batches.

    Args:
        model: The network, in eval mode.
        layers: The layers.
        batches: Calibration batches.

    Returns:
        Layer name to values, float32, one-dimensional; a layer whose inputs are no floating-point numbers is missing.

    Example:
        >>> net, x = nn.Linear(2, 1), torch.tensor([[3.0, -1.0]])
        >>> sample_inputs(net, [Layer("", "linear", (1, 2), calls=1, modules=("",))], [x])
        {'': tensor([ 3., -1.])}
    """
    names = {id(module): layer.name for layer in layers for module in layer_modules(model, layer)}
    watched = [module for layer in layers for module in layer_modules(model, layer)]
    samples = {layer.name: _Sample(layer, sum(map(batch_size, batches))) for layer in layers}
    for batch in batches:

        def visit(module: nn.Module, inputs: Tensor, output: Tensor, size: int = batch_size(batch)) -> None:
            samples[names[id(module)]].add(inputs, size)

        visit_modules(model, watched, [batch], visit, calls=sum(x.calls for x in layers), padding="dropped")
    return {name: torch.cat(sample.values) for name, sample in samples.items() if sample.values}


class _Sample:
    """Values drawn from the inputs of one layer, as many from each batch as its size asks for."""

    def __init__(self, layer: Layer, samples: int) -> None:
        self._wanted = _VALUES / samples / max(layer.calls, 1)
        self._draws = generator(0, f"inputs/{layer.name}")
        self.values: list[Tensor] = []

    def add(self, inputs: Tensor, batch: int) -> None:
        """Draw from one call's inputs, of a batch of so many samples; tokens are left out."""
        if not inputs.is_floating_point() or not inputs.numel():
            return
        values, wanted = inputs.detach().flatten(), max(1, round(self._wanted * batch))
        if wanted < len(values):
            drawn = values[torch.randint(len(values), (wanted,), generator=self._draws).to(values.device)]
            values = torch.cat([drawn, values.amin()[None], values.amax()[None]])
        self.values.append(values.float())


def calibrate_inputs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], bits: Sequence[int]
) -> dict[str, InputGrid]:
    """A grid for the input of every layer, fitted layer by layer, the inputs before it rounded already.

    Costs one forward pass.

    Args:
        model: The network in eval mode, its weights rounded; left as it was. Repair comes afterwards, once for what the
            rounding of weights and that of inputs moved together.
        layers: The layers in order of execution.
        batches: Calibration batches.
        bits: Bit-width of each layer's input, such as from ``allocation.mixed.input_bits``.

    Returns:
        Layer name to grid; an embedding, which takes tokens, has none.

    Example:
        >>> net, layers = nn.Linear(1, 1), [Layer("", "linear", (1, 1), calls=1, modules=("",))]
        >>> calibrate_inputs(net, layers, [torch.arange(4.0)[:, None]], [2])
        {'': InputGrid(bits=2, scale=1.0, zero_point=0)}
    """
    grids: dict[str, InputGrid] = {}
    modules = [module for layer in layers for module in layer_modules(model, layer)]
    # Passes wait ahead of the rounding: they see inputs as they come, and go on with rounded ones.
    with SteppedPasses(model, modules, batches) as passes, rounded_inputs(model, layers, grids):
        for layer, b in zip(layers, bits, strict=True):
            calls = passes.calls(layer_modules(model, layer), layer.calls)
            grids |= input_grid(layer, calls, list(map(batch_size, batches)), b)
    return grids


def input_grid(layer: Layer, calls: Iterable[Sequence[Call]], sizes: Sequence[int], bits: int) -> dict[str, InputGrid]:
    """A grid for the input of one layer.

    Args:
        layer: The layer.
        calls: Its calls, batch by batch.
        sizes: Number of samples in each batch.
        bits: Bit-width b_a.

    Returns:
        The layer's name to its grid; nothing if the layer takes tokens or is not called.
    """
    sample = _Sample(layer, sum(sizes))
    for size, batch_calls in zip(sizes, calls, strict=True):
        for call in batch_calls:
            sample.add(call.shown(call.inputs), size)
    return {layer.name: fit_input_grid(torch.cat(sample.values), bits)} if sample.values else {}
