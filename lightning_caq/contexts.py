"""Contexts: the surroundings in which curvature can be measured at all, whatever the caller's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@contextmanager
def curvature_safe(model: nn.Module) -> Iterator[None]:
    """Make second derivatives possible and exact, in any hook.

    Inference mode and autocast are off and gradients on; attention runs in its one kernel that can be differentiated
    twice, outside its fused layers; compiled modules run eagerly, and recurrent layers without fused kernels, for
    the same reason.

    Args:
        model: The network that will be differentiated.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    parameter = next(model.parameters(), None)
    devices = {"cpu", parameter.device.type if parameter is not None else "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6 and later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


class InFloat32:
    """A context in which a module of half precision, and batches for it, are in float32.

    Curvature cannot be measured in half precision, as under ``bf16-true``; double precision stays as it is. Parameters
    stay the same objects; on leaving, a tensor that was not changed gets back its very values.

    Args:
        model: The network.

    Example:
        >>> net = nn.Linear(2, 2).bfloat16()
        >>> with InFloat32(net):
        ...     net.weight.dtype
        torch.float32
        >>> net.weight.dtype
        torch.bfloat16
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> InFloat32:
        """Convert parameters and buffers."""
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if _is_half(tensor):
                self._own.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return self

    def __exit__(self, *exception: object) -> None:
        """Convert them back."""
        for tensor, own in self._own:
            tensor.data = own if torch.equal(tensor.data, own.float()) else tensor.data.to(own.dtype)
        self._own.clear()

    def batches(self, batches: list[Any]) -> list[Any]:
        """The batches in float32, where they were in half precision."""
        return [tree_map_only(Tensor, lambda t: t.float() if _is_half(t) else t, batch) for batch in batches]

    def outside(self, evaluate: Evaluate | None) -> Evaluate | None:
        """``evaluate``, run in the module's own precision while this context is entered."""
        if evaluate is None:
            return None

        def run(model: nn.Module) -> Mapping[str, float]:
            self.__exit__()
            try:
                return evaluate(model)
            finally:
                self.__enter__()

        return run


def _is_half(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.is_floating_point() and tensor.element_size() < 4
