"""Sharing: the work of measuring, divided over the processes of a distributed run.

Every rank has the same network and the same samples, takes a part of the work and gets the results of all. Ranks meet
ahead of each exchange and say whether they can go on: what fails on one of them fails on all, and nobody waits for a
rank that has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_caq.errors import CalibrationError

T = TypeVar("T")


@dataclass(frozen=True)
class Sharing:
    """One process among those that divide the work; the only one by default.

    All ranks have to call ``sum``, ``gather``, ``first``, ``meet`` and ``agreed`` alike and in the same order. They
    are expected to compute alike too: an iteration that stops a step earlier on one of them, as it may between devices
    of two kinds, is reported as an error.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where tensors have to be for the backend, as on a GPU for NCCL; anywhere by default.

    Example:
        >>> Sharing(rank=1, size=3).mine(["a", "b", "c", "d", "e"])
        ['b', 'e']
        >>> Sharing().sum(torch.ones(2), "ones")
        tensor([1., 1.])
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def mine(self, items: Sequence[T]) -> list[T]:
        """This rank's part of some items, dealt out in turn; it is empty where there are more ranks than items."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum of a tensor over ranks, written into the tensor itself.

        Args:
            tensor: This rank's summand, of the same shape on all.
            what: What is summed, in a word or two; ranks at different places notice by it.

        Returns:
            The tensor.
        """
        self.meet(what)
        if self.size > 1:
            shared = tensor.to(self.device)
            dist.all_reduce(shared)
            tensor.copy_(shared)
        return tensor

    def gather(self, rows: Mapping[str, T], what: str) -> dict[str, T]:
        """Plain values by name, put together from all ranks; each name comes from one of them."""
        return {name: value for own in self._exchange(what, dict(rows)) for name, value in own.items()}

    def first(self, value: T, what: str) -> T:
        """The plain value that rank 0 has, for decisions that all must take alike."""
        found: T = self._exchange(what, value if self.rank == 0 else None)[0]
        return found

    def meet(self, what: str) -> None:
        """Wait for all ranks, ahead of a collective that is not one of these.

        Raises:
            CalibrationError: If another rank has failed, or is somewhere else.
        """
        self._exchange(what, None)

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """A block that succeeds on all ranks or on none.

        A rank on which it fails raises its own error, and the others one that names the rank and that error, at their
        next exchange or at the end of the block. Blocks may lie inside each other.

        Raises:
            CalibrationError: If another rank has failed.
        """
        try:
            yield
            self.meet(f"end of {what}")
        except _ToldError as error:
            raise CalibrationError(str(error)) from None
        except BaseException as error:
            self._exchange(what, None, error)
            raise

    def _exchange(self, what: str, value: Any, error: BaseException | None = None) -> list[Any]:
        """What every rank brings, in their order; one that brings an error learns nothing and has to raise it."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (what, value, error and f"{type(error).__name__}: {error}"))
        failures = [f"rank {rank} failed with {failure}" for rank, (_, _, failure) in enumerate(told) if failure]
        if error is None and failures:
            raise _ToldError(f"Stopped at '{what}', because {'; '.join(failures)}")
        places = [f"rank {rank} at '{place}'" for rank, (place, _, _) in enumerate(told)]
        if not failures and len({place for place, _, _ in told}) > 1:
            raise _ToldError(f"The ranks have fallen out of step: {', '.join(places)}; run it on equal devices.")
        return [value for _, value, _ in told]


class _ToldError(CalibrationError):
    """All ranks know of it already."""


ALONE = Sharing()


def divided(device: torch.device | None = None) -> Sharing:
    """The sharing among all processes of the default process group; ``ALONE`` where there is none.

    Args:
        device: Where tensors have to be for the group's backend.

    Example:
        >>> divided() == ALONE
        True
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Sharing(dist.get_rank(), dist.get_world_size(), device)
