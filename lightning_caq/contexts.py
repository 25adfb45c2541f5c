"""Contexts: the surroundings in which curvature can be measured at all, whatever the caller's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

Validation = Callable[[nn.Module], dict[str, float]]


@contextmanager
def curvature_safe(model: nn.Module) -> Iterator[None]:
    """Make second derivatives possible and exact, in any hook.

    Inference mode and autocast are off and gradients on; attention runs in its one kernel that can be differentiated
    twice; compiled modules run eagerly, and recurrent layers without cuDNN, for the same reason.

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
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


class InFloat32:
    """A context in which a module of another precision, and batches for it, are in float32.

    Under ``bf16-true`` or ``64-true`` parameters are not float32, and curvature is measured in nothing else. Parameters
    stay the same objects; on leaving, a tensor that was not changed gets back its very values.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> InFloat32:
        """Convert parameters and buffers."""
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                self._own.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return self

    def __exit__(self, *exception: object) -> None:
        """Convert them back."""
        for tensor, own in self._own:
            tensor.data = own if torch.equal(tensor.data, own.float()) else tensor.data.to(own.dtype)
        self._own.clear()

    def batches(self, batches: list[Any]) -> list[Any]:
        """The batches in float32."""
        return [tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, b) for b in batches]

    def outside(self, validate: Validation | None) -> Validation | None:
        """``validate``, run in the module's own precision while this context is entered."""
        if validate is None:
            return None

        def run(model: nn.Module) -> dict[str, float]:
            self.__exit__()
            try:
                return validate(model)
            finally:
                self.__enter__()

        return run
