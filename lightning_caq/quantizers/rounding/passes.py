"""Paired passes: the inputs of a layer in the network as it is and in the float one, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_caq.network.batches import batch_size
from lightning_caq.network.layers import Layer, layer_modules
from lightning_caq.network.stepped_passes import Call, SteppedPasses
from lightning_caq.quantizers.calibration import input_grid, rounded_inputs
from lightning_caq.quantizers.grids.activations import InputGrid, change_first


class PairedPasses:
    """Calibration batches on their way through a network that is being rounded, and through the float one beside it.

    Layers are best asked for in order of execution: all of them then cost one forward pass of each network, as long as
    what waits at one place fits in memory.

    Args:
        model: The network, in eval mode.
        layers: The layers that will be asked for.
        batches: Calibration batches.
        floats: What may differ from the network in the float one, by state-dict key.

    Attributes:
        samples: Number of samples.
        inputs: Layer name to the grid that its input is rounded to, in the network as it is alone.

    Example:
        >>> net, layer = nn.Linear(2, 1), Layer("", "linear", (1, 2), calls=1, modules=("",))
        >>> import torch
        >>> with PairedPasses(net, [layer], [torch.ones(3, 2)], {}) as passes:
        ...     [(now, before)] = passes.calls(layer)
        >>> now[0].inputs.shape
        torch.Size([3, 2])
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], floats: Mapping[str, Tensor]
    ) -> None:
        live = model.state_dict(keep_vars=True)
        self._model, self._floats = model, [(live[name], value) for name, value in floats.items()]
        modules = [module for layer in layers for module in layer_modules(model, layer)]
        self._now, self._before = (SteppedPasses(model, modules, batches) for _ in range(2))
        self._stack = ExitStack()
        self._layers, self._sizes = layers, list(map(batch_size, batches))
        self._rounding: dict[str, InputGrid] = {}  # what hooks round to: nothing while the float network runs
        self.inputs: dict[str, InputGrid] = {}
        self.samples = sum(self._sizes)

    def __enter__(self) -> PairedPasses:
        """Watch the layers."""
        for passes in (self._now, self._before):
            self._stack.enter_context(passes)
        # Passes wait ahead of the rounding: they see inputs as they come, and go on with rounded ones.
        self._stack.enter_context(rounded_inputs(self._model, self._layers, self._rounding))
        return self

    def __exit__(self, *exception: object) -> None:
        """End all passes."""
        self._stack.close()

    def round_inputs(self, layer: Layer, bits: int) -> None:
        """From here on round what reaches a layer, on a grid for what reaches it now."""
        calls = self._now.calls(layer_modules(self._model, layer), layer.calls)
        self.inputs |= input_grid(layer, calls, self._sizes, bits)
        self._rounding.update(self.inputs)

    def calls(self, layer: Layer) -> Iterator[tuple[list[Call], list[Call]]]:
        """For each batch every call of a layer: in the network as it is, its input rounded, and in the float one."""
        modules, grid = layer_modules(self._model, layer), self.inputs.get(layer.name)
        before = self._before.calls(modules, layer.calls)
        for now in self._now.calls(modules, layer.calls):
            with self._in_float():
                floating = next(before)
            yield now if grid is None else [_rounded(call, grid) for call in now], floating

    @contextmanager
    def _in_float(self) -> Iterator[None]:
        """While open, the network is the float one."""
        self._rounding.clear()
        try:
            with holding(self._floats):
                yield
        finally:
            self._rounding.update(self.inputs)


def _rounded(call: Call, grid: InputGrid) -> Call:
    """The same call with its input on the grid."""
    args, kwargs = change_first(grid.round, call.args, call.kwargs)
    return replace(call, args=args, kwargs=kwargs)


@contextmanager
def holding(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the tensors of a network hold other values for a while; nothing is copied.

    Args:
        values: Tensors of the network, each with the one whose values it is to take.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1, bias=False)
        >>> with holding([(net.weight, torch.tensor([[3.0]]))]), torch.no_grad():
        ...     print(float(net(torch.ones(1, 1))))
        3.0
    """
    originals = [tensor.data for tensor, _ in values]
    try:
        for tensor, value in values:
            tensor.data = value
        yield
    finally:
        for (tensor, _), value in zip(values, originals, strict=True):
            tensor.data = value
