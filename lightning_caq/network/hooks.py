"""Visits: run a network over batches and look at what goes into and comes out of some of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_caq.network.forward import run_model
from lightning_caq.network.padding import padding_of, padding_zeroed, without_padding
from lightning_caq.utilities.unseen import gradients_as_usual

Hook = Callable[[nn.Module, Tensor, Tensor], Tensor | None]


@contextmanager
def watching(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call a hook after each call of some modules, while the context is open.

    Args:
        modules: The modules; one that is named twice is watched once.
        hook: Called with the module, its first argument, by place or by keyword, and its output. What it returns,
            unless ``None``, takes the place of the output.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> with watching([net], lambda module, x, y: torch.zeros_like(y)):
        ...     float(net(input=torch.ones(2)).detach())
        0.0
    """

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        with gradients_as_usual():
            return hook(module, args[0] if args else next(iter(kwargs.values())), output)

    handles = [m.register_forward_hook(after, with_kwargs=True) for m in {id(m): m for m in modules}.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(module: nn.Module, tensor: Tensor, keep: Tensor | None) -> Tensor:
    return tensor


_PADDING = {"shown": _shown, "dropped": without_padding, "zeroed": padding_zeroed}


class _Seen(Exception):
    """Raised inside a forward pass once everything has been seen."""


def visit_modules(
    model: nn.Module,
    modules: Iterable[nn.Module],
    batches: Iterable[Any],
    visit: Callable[[nn.Module, Tensor, Tensor], None],
    *,
    calls: int | None = None,
    padding: Literal["shown", "dropped", "zeroed"] = "shown",
) -> None:
    """Run batches without gradients and show every call of the modules.

    Args:
        model: The network, in the mode it shall run in.
        modules: The modules to watch.
        batches: The batches to run.
        visit: Called with the module, its first argument and its output.
        calls: How many calls to see in each batch; what follows in the network is then not run. By default all runs.
        padding: What is done to the vectors of positions that a batch's padding mask leaves out.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> show = lambda module, x, y: print(tuple(x.shape), tuple(y.shape))
        >>> visit_modules(net, [net[1]], [torch.zeros(3, 2, 2)], show, calls=1)
        (3, 4) (3, 2)
    """
    left = 0
    keep: Tensor | None = None
    treat = _PADDING[padding]

    def hook(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        nonlocal left
        visit(module, treat(module, inputs, keep), treat(module, output, keep))
        left -= 1
        if left == 0:
            raise _Seen

    with watching(modules, hook), torch.no_grad():
        for batch in batches:
            left, keep = calls if calls is not None else -1, padding_of(batch)
            try:
                run_model(model, batch)
            except _Seen:
                continue
