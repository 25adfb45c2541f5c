"""Adaptive frequencies: a law for each context, which starts geometric and follows the codes that were coded."""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_caq.quantizers.packing.contexts import ONE, Ints, low_bits, typical_magnitudes

LARGEST = 18
"""Magnitudes up to here, without their low bits, have symbols of their own."""
ESCAPE = LARGEST + 1
SYMBOLS = LARGEST + 2

Law = Any
"""A law of ``constriction``, which has no types."""

_TOTAL = 1 << 16  # float32 holds whole frequencies with such a sum exactly
_INCREMENT = 32
_START = 24 * _INCREMENT  # weight of the law that a context starts with
_MOST = 1 << 19  # counts are halved before a context has more
_RENEWED = 4096  # codes after which frequencies are computed anew, fewer at the start


class AdaptiveLaws:
    """The laws of all contexts; the decoder's follow the same codes and stay equal to the encoder's."""

    def __init__(self) -> None:
        self._counts = _starting_counts()
        self._laws: list[Law | None] = [None] * len(self._counts)
        self._seen = self._since = 0

    def __getitem__(self, context: int) -> Law:
        """The law of one context."""
        if self._laws[context] is None:
            self._laws[context] = law(_frequencies(self._counts[context]))
        return self._laws[context]

    def learn(self, contexts: Ints, symbols: Ints) -> None:
        """Count the symbols of one column."""
        self._counts += _INCREMENT * np.bincount(contexts * SYMBOLS + symbols, minlength=self._counts.size).reshape(
            self._counts.shape
        )
        self._seen += len(symbols)
        self._since += len(symbols)
        if self._since >= min(_RENEWED, self._seen / 24):
            self._counts[self._counts.sum(1) > _MOST] //= 2
            self._laws = [None] * len(self._counts)
            self._since = 0


def law(frequencies: NDArray[np.float32]) -> Law:
    """The law of symbols 0, 1, … with these frequencies."""
    return constriction.stream.model.Categorical(frequencies, perfect=False)


def _frequencies(counts: Ints) -> NDArray[np.float32]:
    """Whole frequencies that sum to 2^16, none of them zero."""
    table = 1 + counts * (_TOTAL - SYMBOLS) // int(counts.sum())
    table[int(table.argmax())] += _TOTAL - int(table.sum())
    return table.astype(np.float32)


def _starting_counts() -> Ints:
    """Geometric laws of each class's typical magnitude, shape (2 · classes, symbols)."""
    laws = []
    for typical, low in zip(typical_magnitudes(), low_bits().tolist(), strict=True):
        laws.append(_geometric(typical >> low))
    return np.array(laws * 2, dtype=np.int64)


def _geometric(mean: int) -> list[int]:
    """Counts of a geometric law with a mean in 1/256."""
    mass, law = 1 << 40, []
    for _ in range(LARGEST + 1):
        here = mass * ONE // (mean + ONE)
        mass -= here
        law.append(here)
    return [max(x * _START >> 40, 1) for x in (*law, mass)]
