"""Contexts: how large a code will probably be, told from what the decoder has already.

Matrices are walked through side by side, one column of each at a time. The expected magnitude of a code is the mean of
its row so far, times how large the columns nearby were compared with the whole matrix; a matrix of a convolution also
looks at the position before in the row. Its logarithm, in half octaves, is the context, together with the quantizer
that the row's trellis is in. Contexts mean the same in all matrices, so these share what is learned. All of it is
integer arithmetic: encoder and decoder come to the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ONE = 256
"""Magnitudes are counted in units of 1/256."""

NEXT_STATE: Ints = np.array([[0, 2], [7, 5], [1, 3], [6, 4], [2, 0], [5, 7], [3, 1], [4, 6]], dtype=np.int64)
"""Trellis of eight states (ISO/IEC 15938-17): a state and the parity of a code give the next state; odd states use the
quantizer of odd multiples."""

CLASSES = 48
"""Classes of expected magnitude, half an octave each, the first up to 8/256."""

_FIRST = 260  # exponent and first bit of the fraction of the float32 8.0
_FIRST_LEVEL = (127 << 3) - 1
_LARGEST = 1 << 20  # magnitudes beyond count as this in what is expected
_OF_ROW, _OF_MATRIX, _OF_COLUMNS = 6, 16, 2  # how many codes of mean size each mean starts with


@dataclass(frozen=True)
class MatrixForm:
    """What the decoder knows of a matrix of codes beforehand.

    Attributes:
        rows: Number of rows, one an output.
        columns: Number of columns.
        period: How many columns in a row belong to one input channel, the size of a kernel.
        trellis: Whether the codes were chosen on the trellis.
    """

    rows: int
    columns: int
    period: int = 1
    trellis: bool = False


def magnitude_level(codes: NDArray[np.integer]) -> int:
    """Mean magnitude as one byte, eight steps an octave.

    Example:
        >>> magnitude_level(np.array([[1, -1, 0, 2]])), level_magnitude(magnitude_level(np.array([[1, -1, 0, 2]])))
        (65, 256)
    """
    total = int(np.minimum(np.abs(codes), _LARGEST).sum(dtype=np.int64))
    mean = np.array([max(ONE * total // max(codes.size, 1), 1)], dtype=np.float32)
    return int(mean.view(np.int32)[0] >> 20) - _FIRST_LEVEL


def level_magnitude(level: int) -> int:
    """The mean magnitude that a byte stands for, in 1/256, at least 1."""
    return max(int(np.array([(level + _FIRST_LEVEL) << 20], dtype=np.int32).view(np.float32)[0]), 1)


def low_bits() -> Ints:
    """Bits at the low end of a code that are as good as random, for each class."""
    octave = (np.arange(CLASSES) + _FIRST) // 2 - 127
    return np.maximum(octave - 9, 0)


def typical_magnitudes() -> list[int]:
    """A magnitude in the middle of each class, in 1/256."""
    return [int(8 * (2.5, 3.5)[k % 2] / 2 * 2 ** (k // 2)) for k in range(CLASSES)]


class Contexts:
    """The contexts of the next code of every row, kept up to date while matrices are walked through.

    Args:
        forms: Forms of the matrices, those with most columns first, so that the rows that go on are always the first.
        levels: Mean magnitude of each matrix as one byte.
    """

    def __init__(self, forms: Sequence[MatrixForm], levels: Sequence[int]) -> None:
        self._columns = np.array([form.columns for form in forms], dtype=np.int64)
        self._rows = np.array([form.rows for form in forms], dtype=np.int64)
        self._period = np.array([form.period for form in forms], dtype=np.int64)
        self._mean = np.array([level_magnitude(level) for level in levels], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._rows)])
        rows = int(self._starts[-1])
        self._of_row = np.zeros(rows, dtype=np.int64)
        self._last = np.repeat(self._mean, self._rows)
        self._state = np.zeros(rows, dtype=np.int64)
        self._trellis = np.repeat(np.array([form.trellis for form in forms], dtype=np.int64), self._rows)
        self._spatial = np.repeat(np.where(self._period > 1, 1, 0), self._rows)
        self._mixed = bool(self._spatial.any())
        self._sums = np.zeros((int(self._columns.max(initial=0)) + 1, len(forms)), dtype=np.int64)
        self.column = 0

    @property
    def matrices(self) -> int:
        """How many of the matrices have another column."""
        return int((self._columns > self.column).sum())

    @property
    def rows(self) -> int:
        """How many rows these have together."""
        return int(self._starts[self.matrices])

    def next(self) -> Ints:
        """The context of the next code of each row that goes on: quantizer · CLASSES + class."""
        j, matrices = self.column, self.matrices
        rows = int(self._starts[matrices])
        average, factor = self._of_matrices(matrices)
        prior = np.repeat(_OF_ROW * average, self._rows[:matrices])
        expected = (self._of_row[:rows] * ONE + prior) // (j + _OF_ROW)
        if self._mixed:
            expected += self._spatial[:rows] * (self._last[:rows] - expected) >> 2
        expected *= np.repeat(factor, self._rows[:matrices])
        expected >>= 8
        # A float's exponent and the first bit of its fraction are a logarithm, in half octaves.
        classes = (expected.astype(np.float32).view(np.int32) >> 22) - _FIRST
        quantizer = self._state[:rows] & self._trellis[:rows]
        contexts: Ints = quantizer * CLASSES + np.clip(classes, 0, CLASSES - 1)
        return contexts

    def _of_matrices(self, count: int) -> tuple[Ints, Ints]:
        """Mean magnitude of each matrix so far, and how columns nearby compare with it, both in 1/256."""
        j, rows = self.column, self._rows[:count]
        average = (self._sums[j, :count] * ONE + _OF_MATRIX * rows * self._mean[:count]) // ((j + _OF_MATRIX) * rows)
        average = np.maximum(average, 1)
        period, which = self._period[:count], np.arange(count)
        first = j - j % period
        before = np.maximum(j - period, 0)  # the same position of the channel before
        seen = 2 * (j >= period)
        near = self._sums[j, :count] - self._sums[first, which]
        near = near + seen * (self._sums[before + 1, which] - self._sums[before, which])
        near = (near * ONE // rows + _OF_COLUMNS * average) // (j - first + seen + _OF_COLUMNS)
        return average, np.maximum(near * ONE // average, 1)

    def update(self, codes: Ints) -> None:
        """Go one column on, whose codes are now known."""
        rows, matrices, j = len(codes), self.matrices, self.column
        magnitude = np.minimum(np.abs(codes), _LARGEST)
        self._of_row[:rows] += magnitude
        self._last[:rows] = magnitude * ONE
        added = np.add.reduceat(magnitude, self._starts[:matrices])
        self._sums[j + 1, :matrices] = self._sums[j, :matrices] + added
        self._state[:rows] = NEXT_STATE.ravel()[2 * self._state[:rows] + (codes & 1)]
        self.column += 1
