"""Isolation: work on a network that leaves nothing behind, whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the global random states of torch, numpy and Python back afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Set the global random states for a while, and put them back afterwards.

    Args:
        seed: The seed to start from.

    Example:
        >>> with seeded(1):
        ...     a = random.random()
        >>> with seeded(1):
        ...     print(a == random.random())
        True
    """
    with random_states_kept():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while, and put everything back afterwards.

    Always restored: the train/eval flag of every module and the global random states of torch, numpy and Python.
    Restored if the block raises, Ctrl-C included: parameters, buffers and the classes of the modules. That takes a copy
    of them; inside another block for the same network there is one already, and no second is made.

    Args:
        model: The network.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with preserved(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    flags = {module: module.training for module in model.modules()}
    try:
        with _restored_on_failure(model), random_states_kept():
            model.eval()
            yield
    finally:
        for module, training in flags.items():
            module.training = training


_copied: ContextVar[frozenset[int]] = ContextVar("networks that a block around this one has a copy of")


@contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put parameters, buffers and modules back if the block raises."""
    outer = _copied.get(frozenset())
    if id(model) in outer:
        yield
        return
    shapes = {module: (module.__class__, dict(module.__dict__), _contents(module)) for module in model.modules()}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    values = [t.detach().clone() for t in tensors]
    token = _copied.set(outer | {id(model)})
    try:
        yield
    except BaseException:
        for module, (kind, attributes, contents) in shapes.items():
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in contents.items():
                container = module.__dict__[name]
                container.clear()
                container.update(content)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        raise
    finally:
        _copied.reset(token)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the containers that say what a module consists of; each is put back into the container itself."""
    names = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {name: module.__dict__[name].copy() for name in names}
