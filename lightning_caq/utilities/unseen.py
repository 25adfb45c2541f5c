"""Unseen: gradients through parts of a network that cut them off, and without the tricks that save their memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_state = threading.local()
_lock = threading.Lock()
_open = 0
_own: dict[tuple[Any, str], Any] = {}


@contextmanager
def gradients_through() -> Iterator[None]:
    """While open, ``no_grad``, ``inference_mode``, ``set_grad_enabled`` and ``detach`` cut off no gradient.

    In this thread alone: a forward pass that waits in another thread changes nothing here.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> with gradients_through():
        ...     with torch.no_grad():
        ...         y = 2 * x.detach()
        >>> y.requires_grad, torch.is_grad_enabled()
        (True, True)
    """
    _install()
    _state.depth = getattr(_state, "depth", 0) + 1
    try:
        with _Attached():
            yield
    finally:
        _state.depth -= 1
        _remove()


@contextmanager
def gradients_as_usual() -> Iterator[None]:
    """Within ``gradients_through``: code that is not the network's, such as hooks, cuts gradients off as ever.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> with gradients_through(), gradients_as_usual():
        ...     x.detach().requires_grad
        False
    """
    depth, _state.depth = getattr(_state, "depth", 0), 0
    try:
        yield
    finally:
        _state.depth = depth


def _passing() -> bool:
    return getattr(_state, "depth", 0) > 0


def _install() -> None:
    global _open
    with _lock:
        _open += 1
        if _open > 1:
            return
        for kind in (torch.no_grad, torch.inference_mode, torch.set_grad_enabled):
            for name in ("__enter__", "__exit__"):
                _own[kind, name] = kind.__dict__[name]
                setattr(kind, name, _skipped(_own[kind, name]))
        _own[torch.set_grad_enabled, "__init__"] = torch.set_grad_enabled.__dict__["__init__"]
        torch.set_grad_enabled.__init__ = _skipped_start(  # type: ignore[method-assign]
            _own[torch.set_grad_enabled, "__init__"]
        )


def _remove() -> None:
    global _open
    with _lock:
        _open -= 1
        if not _open:
            for (kind, name), function in _own.items():
                setattr(kind, name, function)
            _own.clear()


def _skipped(function: Any) -> Any:
    """A method that does nothing where gradients pass."""

    def method(self: Any, *args: Any) -> Any:
        return None if _passing() else function(self, *args)

    return method


def _skipped_start(function: Any) -> Any:
    """``set_grad_enabled(mode)``, which works as soon as it is made."""

    def start(self: Any, mode: bool) -> None:
        if _passing():
            self.prev, self.mode = torch.is_grad_enabled(), mode
        else:
            function(self, mode)

    return start


class _Attached(TorchFunctionMode):
    """Lets ``detach`` and ``.data`` give the tensor itself."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _passing() and func in (Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__):  # type: ignore[attr-defined]
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def checkpointing_off() -> Iterator[None]:
    """While open, ``torch.utils.checkpoint.checkpoint`` calls its function and keeps what it computed.

    Checkpointed parts run their forward pass again in the backward pass, which gradients taken one by one, and second
    ones, do not go with.
    """
    import torch.utils.checkpoint as module

    def plain(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    class Plain:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

    with ExitStack() as stack:
        # ``checkpoint`` itself may have been imported by name: what it calls is replaced.
        generators = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
        for name, value in (("CheckpointFunction", Plain), *((name, plain) for name in generators)):
            if hasattr(module, name):
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield
