"""Paired passes: the inputs of a layer in the network as it is and in the float one, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_caq.batches import batch_size
from lightning_caq.layers import Layer, layer_modules
from lightning_caq.stepping import Call, SteppedPasses


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
        self.samples = sum(map(batch_size, batches))

    def __enter__(self) -> PairedPasses:
        """Watch the layers."""
        for passes in (self._now, self._before):
            self._stack.enter_context(passes)
        return self

    def __exit__(self, *exception: object) -> None:
        """End all passes."""
        self._stack.close()

    def calls(self, layer: Layer) -> Iterator[tuple[list[Call], list[Call]]]:
        """For each batch every call of a layer: in the network as it is, and in the float one."""
        modules = layer_modules(self._model, layer)
        before = self._before.calls(modules, layer.calls)
        for now in self._now.calls(modules, layer.calls):
            with holding(self._floats):
                floating = next(before)
            yield now, floating


@contextmanager
def holding(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let the tensors of a network hold other values for a while; nothing is copied.

    Args:
        values: Tensors of the network, each with the one whose values it shall hold.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1, bias=False)
        >>> with holding([(net.weight, torch.tensor([[3.0]]))]), torch.no_grad():
        ...     print(float(net(torch.ones(1, 1))))
        3.0
    """
    own = [tensor.data for tensor, _ in values]
    try:
        for tensor, value in values:
            tensor.data = value
        yield
    finally:
        for (tensor, _), value in zip(values, own, strict=True):
            tensor.data = value
