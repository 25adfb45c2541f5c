"""Stepping: forward passes that wait ahead of a module's calls, so that the module can be changed before they go on.

What is done to a network layer by layer needs the inputs of each layer in the network as changed so far. Passes begun
anew for every layer cost as many passes as there are layers; passes that wait cost one.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_caq.network.forward import run_model
from lightning_caq.network.padding import padding_of, without_padding
from lightning_caq.utilities.memory import release_memory

_local = threading.local()
_NAME = "caq-pass"

# A pass that waits holds the input of the module and what goes around it in its block.
_TENSORS_HELD = 2


@dataclass(frozen=True)
class Call:
    """A call of a module that has not been carried out yet.

    Attributes:
        module: The module.
        args: Its arguments by place.
        kwargs: Its arguments by keyword.
        keep: Which positions of the batch are no padding, shape (samples, positions); ``None`` where all are none.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keep: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """The first argument."""
        first: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return first

    def shown(self, tensor: Tensor) -> Tensor:
        """An input or output of the module without the vectors of padding."""
        return without_padding(self.module, tensor, self.keep)

    def output(self) -> Tensor:
        """What the module gives as it is now; the call itself still waits."""
        found: Tensor = self.module.forward(*self.args, **self.kwargs)
        return found


class SteppedPasses:
    """A forward pass over each of some batches, without gradients, each waiting where it is told to.

    Passes run in threads of their own, one at a time and only while ``calls`` looks at them. A pass that has gone by
    what is asked for, or by a module that was changed since, begins anew.

    Args:
        model: The network, in the mode it shall run in.
        modules: The modules that passes may wait at.
        batches: The batches.
        memory: Bytes that waiting passes may hold together, by a rough count; passes beyond that are ended and begun
            anew each time, as with large images in the first layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> with SteppedPasses(net, net, [torch.ones(1, 1)]) as passes, torch.no_grad():
        ...     for module in net:
        ...         [[call]] = passes.calls([module], 1)
        ...         print(float(call.inputs))
        ...         _ = module.weight.fill_(3.0)  # the next layer sees what comes of it
        1.0
        3.0
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[nn.Module], batches: Sequence[Any], *, memory: int = 2**29
    ) -> None:
        self._memory = memory
        self._modules = {id(module): module for module in modules}
        self._handles: list[Any] = []
        self._passes = [_Pass(model, batch) for batch in batches]

    def __enter__(self) -> SteppedPasses:
        """Watch the modules."""
        self._handles = [m.register_forward_pre_hook(self._wait, with_kwargs=True) for m in self._modules.values()]
        return self

    def __exit__(self, *exception: object) -> None:
        """End all passes where they are."""
        for forward in self._passes:
            forward.close()
        for handle in self._handles:
            handle.remove()
        release_memory()

    def calls(self, modules: Collection[nn.Module], number: int) -> Iterator[list[Call]]:
        """For each batch the next calls of some modules; the pass then waits ahead of the last of them.

        Args:
            modules: Some of the modules watched.
            number: How many calls to see; fewer are given where a pass ends before.
        """
        wanted = {id(module) for module in modules}
        for forward in self._passes:
            yield forward.reach(wanted, number)
            if sum(each.held for each in self._passes) > self._memory:
                forward.close()
        release_memory()

    def _wait(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: one of these passes waits; calls by others, such as an evaluation in between, do not."""
        running: _Pass | None = getattr(_local, "running", None)
        if running in self._passes:
            running.wait(Call(module, args, kwargs, running.keep))


class _ClosedError(BaseException):
    """Raised inside a pass to end it; not an ``Exception``, so that no network catches it."""


class _Pass:
    """One forward pass in a thread that hands over at every watched call."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model, self._batch = model, batch
        self.keep = padding_of(batch)
        self._thread: threading.Thread | None = None
        self._call: Call | None = None
        self._error: BaseException | None = None
        self._gone: set[int] = set()
        self._stale = self._closing = False

    def reach(self, wanted: Collection[int], number: int) -> list[Call]:
        """Go on until so many of the wanted calls were seen, or to the end."""
        if self._thread is None or self._stale or self._call is None or not self._gone.isdisjoint(wanted):
            self._begin()
        found: list[Call] = []
        while self._call is not None:
            if id(self._call.module) in wanted:
                found.append(self._call)
                if len(found) == number:
                    break
            self._go_on()
        # Calls that were let through saw their module as it was before whatever is done to it now.
        self._stale = not self._gone.isdisjoint(wanted)
        return found

    @property
    def held(self) -> int:
        """About how many bytes the pass holds while it waits."""
        return 0 if self._call is None else _TENSORS_HELD * self._call.inputs.nbytes

    def close(self) -> None:
        """End the pass where it is."""
        if self._thread is not None:
            self._closing = True
            self._go.release()
            self._thread.join()
        self._thread = self._call = None

    def wait(self, call: Call) -> None:
        """In the pass: hand over, until it is told to go on."""
        self._call = call
        self._ready.release()
        self._go.acquire()
        if self._closing:
            raise _ClosedError

    def _begin(self) -> None:
        self.close()
        self._go, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        self._gone, self._error, self._stale, self._closing = set(), None, False, False
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        self._thread = threading.Thread(target=self._run, args=(device,), name=_NAME, daemon=True)
        self._thread.start()
        self._hand_over()

    def _go_on(self) -> None:
        assert self._call is not None
        self._gone.add(id(self._call.module))
        self._call = None
        self._go.release()
        self._hand_over()

    def _hand_over(self) -> None:
        self._ready.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, device: torch.device) -> None:
        _local.running = self
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device belongs to the thread
        try:
            with torch.no_grad():
                run_model(self._model, self._batch)
        except _ClosedError:
            pass
        except BaseException as error:
            self._error = error
        self._call = None
        self._ready.release()
