"""Progress: one line a step of the road, written wherever the caller wants to read it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_caq.notes import Note

Say = Callable[[str], None]


def silent(message: str) -> None:
    """Say nothing."""


class Progress:
    """Announces steps and keeps the seconds that each took.

    Args:
        say: Called with one line of text at a time.

    Example:
        >>> progress = Progress(print)
        >>> with progress.step("allocation"):
        ...     pass
        caq: allocation ...
        >>> list(progress.seconds)
        ['allocation']
    """

    def __init__(self, say: Say = silent) -> None:
        self._say = say
        self.seconds: dict[str, float] = {}

    def say(self, message: str) -> None:
        """Write one line."""
        self._say(f"caq: {message}")

    def tell(self, note: Note) -> None:
        """Bring a note before the user at once: what should be acted on as a warning, all else as a line."""
        if note.severity == "warning":
            warnings.warn(f"caq: {note}", stacklevel=2)
        else:
            self.say(note)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step, and add the time it takes to ``seconds[name]``."""
        self.say(f"{name} ...")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def duration(seconds: float) -> str:
    """Seconds or minutes, in words.

    Example:
        >>> duration(4.2), duration(130)
        ('5 s', '3 min')
    """
    return f"{int(seconds) + 1} s" if seconds < 100 else f"{int(seconds / 60) + 1} min"
