"""Progress: what is being done, how long it will take, and what is left, wherever the caller wants to read it."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_caq.notes import Note

Say = Callable[[str], None]
QUIET = 3.0
"""Seconds for which a step adds no line to those before it, once an estimate was given."""


def silent(message: str) -> None:
    """Say nothing."""


class Progress:
    """Announces steps and keeps the seconds that each took.

    Without an estimate every step is a line. Once there is one, ``announce`` gives it, and steps are shown on a bar,
    or as a line wherever a while has gone by since the last one.

    Args:
        say: Called with one line of text at a time.
        bar: Whether to draw a progress bar on standard error.
        told: Notes that need not be brought again; those that are brought are added.

    Example:
        >>> progress = Progress(print)
        >>> with progress.step("allocation"):
        ...     pass
        caq: allocation ...
        >>> list(progress.seconds)
        ['allocation']
        >>> progress.expect("networks", 4.2, times=3, steps=("rounding", "evaluation"))
        >>> progress.expect("studies", 2.5)
        >>> progress.announce("3 layers")
        caq: 3 layers: about 16 s (networks 13 s, studies 3 s)
        >>> with progress.step("rounding (cet)"):  # too soon for a line
        ...     pass
    """

    def __init__(self, say: Say = silent, *, bar: bool = False, told: set[str] | None = None) -> None:
        self._say = say
        self._wants_bar = bar
        self._told = set() if told is None else told
        self._parts: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._bar: Any = None
        self._begun: float | None = None
        self._done = self._line = 0.0
        self.headline = ""
        self.seconds: dict[str, float] = {}

    def say(self, message: str) -> None:
        """Write one line."""
        if self._bar is not None:
            self._bar.clear()
        self._line = time.perf_counter()
        self._say(f"caq: {message}")

    def tell(self, note: Note) -> None:
        """Bring a note before the user at once: what should be acted on as a warning, all else as a line, and once."""
        if note in self._told:
            return
        self._told.add(str(note))
        if note.severity == "warning":
            warnings.warn(f"caq: {note}", stacklevel=2)
        else:
            self.say(note)

    def expect(self, part: str, seconds: float, *, times: int = 1, steps: Sequence[str] = ()) -> None:
        """Count on a part of the work.

        Args:
            part: What to call it.
            seconds: About how long it takes once.
            times: How often it is done.
            steps: Its steps, by their names up to a bracket; the part itself by default.
        """
        self._parts[part] = times * seconds
        self._shares |= {step: seconds / max(len(steps), 1) for step in steps or (part,)}

    @property
    def expected(self) -> float:
        """Seconds that all parts are expected to take."""
        return sum(self._parts.values())

    def announce(self, what: str) -> None:
        """Say what is going to be done and how long that takes, part by part."""
        listed = ", ".join(f"{part} {duration(seconds)}" for part, seconds in self._parts.items())
        detail = f" ({listed})" if len(self._parts) > 1 else ""
        self.say(f"{self.headline}{what}: about {duration(self.expected)}{detail}")
        if self._begun is None and self._parts and self.headline and self._wants_bar:
            tqdm: Any = importlib.import_module("tqdm").tqdm

            form = "{desc} {percentage:3.0f}%|{bar:24}| {elapsed} gone, about {remaining} left"
            self._bar = tqdm(total=self.expected, bar_format=form, leave=False)
        self._begun = time.perf_counter()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step, and add the time it takes to ``seconds[name]``."""
        self._show(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            share = min(self._shares.get(name.partition(" (")[0], 0.0), max(self.expected - self._done, 0.0))
            self._done += share
            if self._bar is not None:
                self._bar.update(share)

    def _show(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"caq: {name}")
        elif self._begun is None:
            self.say(f"{name} ...")
        elif time.perf_counter() - self._line > QUIET:
            left = self.expected - self._done
            self.say(f"{name} ..." + (f" (about {duration(left)} left)" if left > 0 else ""))


def duration(seconds: float) -> str:
    """Seconds or minutes, in words.

    Example:
        >>> duration(4.2), duration(130)
        ('5 s', '3 min')
    """
    return f"{int(seconds) + 1} s" if seconds < 100 else f"{int(seconds / 60) + 1} min"
