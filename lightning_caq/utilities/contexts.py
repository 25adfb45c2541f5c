"""Contexts: the surroundings in which curvature can be measured at all, whatever the caller's are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from lightning_caq.utilities.structures import map_tensors
from lightning_caq.utilities.unseen import checkpointing_off

Evaluate = Callable[[nn.Module], Mapping[str, Any]]
"""Metrics of a network by name: numbers, or tensors with one number for each sample."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Take products of float32 numbers in float32.

    A GPU's convolutions round their factors to TF32, of 10 binary digits, unless told otherwise; matrix products do
    where ``torch.set_float32_matmul_precision`` allows it.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with full_float32():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    backends: Any = torch.backends
    with ExitStack() as stack:
        try:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            stack.callback(setattr, backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32)
            torch.set_float32_matmul_precision("highest")
            backends.cudnn.allow_tf32 = False
        except RuntimeError:  # set by the switches of torch 2.9, beside which the old ones cannot be read
            stack.pop_all()
            for part in (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"
        yield


@contextmanager
def curvature_safe(model: nn.Module) -> Iterator[None]:
    """Make second derivatives possible and exact, in any hook.

    Inference mode and autocast are off and gradients on; float32 is not shortened; attention runs in its one kernel
    that can be differentiated twice, outside its fused layers; compiled modules run eagerly, recurrent layers without
    fused kernels, and checkpointed parts without their checkpoints, for the same reason.

    Args:
        model: The network that will be differentiated.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    parameter = next(model.parameters(), None)
    devices = {"cpu", parameter.device.type if parameter is not None else "cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(full_float32())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(checkpointing_off())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6 and later
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            fused: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
            for backend in fused:
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
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

    def batch(self, batch: Any) -> Any:
        """A batch in float32, where it was in half precision."""
        return map_tensors(lambda path, t: t.float() if _is_half(t) else t, batch)

    def outside(self, evaluate: Evaluate) -> Evaluate:
        """``evaluate``, run in the module's own precision while this context is entered."""

        def run(model: nn.Module) -> Mapping[str, Any]:
            self.__exit__()
            try:
                return evaluate(model)
            finally:
                self.__enter__()

        return run


def _is_half(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.is_floating_point() and tensor.element_size() < 4
