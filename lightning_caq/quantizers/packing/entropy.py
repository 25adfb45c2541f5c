"""Entropy coding of integer codes without bounds: adaptive contexts and ANS, the same on every machine.

What a code costs is what it says beyond its context (``contexts``): its magnitude is coded by a law of its context that
follows the codes (``adaptive``), its sign and the low bits of large codes as they are. Nothing but one byte a matrix is
stored beside the codes.

Sources: asymmetric numeral systems (Duda 2013) by ``constriction`` (Bamler 2022); adaptive contexts and escapes as in
DeepCABAC (ISO/IEC 15938-17); sequential frequencies (Krichevsky & Trofimov 1981).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from lightning_caq.quantizers.packing.adaptive import ESCAPE, LARGEST, AdaptiveLaws, Law, law
from lightning_caq.quantizers.packing.contexts import (
    CLASSES,
    Contexts,
    Ints,
    MatrixForm,
    low_bits,
    magnitude_level,
)

LIMIT = 1 << 30
"""Codes are below this in magnitude."""

_Coder = constriction.stream.stack.AnsCoder
_Run = tuple[int, int, int]
"""A context, and the first place in order that has it and the one behind its last."""
_Part = tuple[NDArray[Any], Law]
"""Symbols, and the law that codes them."""

_LOW_BITS = np.tile(low_bits(), 2)
_LENGTHS = law(2.0 ** -np.arange(1, 31).astype(np.float32))  # Elias's gamma code
_PIECE = 15
_HEADER = struct.Struct("<4sII")
_MAGIC = b"CAQ1"


class CodingError(ValueError):
    """Bytes that are no stream of codes, or not one of these shapes."""


def encode(matrices: Sequence[NDArray[np.integer]], forms: Sequence[MatrixForm]) -> bytes:
    """One stream of all matrices.

    Args:
        matrices: Codes, each of shape (rows, columns), below 2^30 in magnitude.
        forms: Their forms.

    Returns:
        A header of 12 bytes with a checksum, one byte a matrix, and whole words of ANS.

    Raises:
        CodingError: If a code is too large, or a matrix has another shape than its form.

    Example:
        >>> codes, form = np.array([[0, 1, 0, -3], [0, 0, 2, 100]]), MatrixForm(2, 4)
        >>> decode(encode([codes], [form]), [form])[0].tolist()
        [[0, 1, 0, -3], [0, 0, 2, 100]]
    """
    columns = [_checked(matrix, form) for matrix, form in zip(matrices, forms, strict=True)]
    levels = [magnitude_level(x) for x in columns]
    order = _order(forms)
    contexts, laws = Contexts([forms[i] for i in order], [levels[i] for i in order]), AdaptiveLaws()
    columns = [columns[i] for i in order]
    parts: list[_Part] = []
    while count := contexts.matrices:
        here = contexts.next()
        codes = np.concatenate([x[contexts.column] for x in columns[:count]])
        places, runs = _runs(here)
        in_order, low = codes[places], _LOW_BITS[here[places]]
        symbols = np.minimum(np.abs(in_order) >> low, ESCAPE)
        parts += _parts(in_order, symbols, low, runs, laws)
        laws.learn(here[places], symbols)
        contexts.update(codes)
    payload = bytes(levels) + _words(parts)
    return _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def decode(stream: bytes, forms: Sequence[MatrixForm]) -> list[Ints]:
    """The matrices of a stream, each of shape (rows, columns).

    Args:
        stream: What ``encode`` gave.
        forms: The forms of the matrices.

    Raises:
        CodingError: If the stream is cut, was changed, or holds other matrices.
    """
    levels, words = _checked_stream(stream, len(forms))
    try:
        coder = _Coder(words)
    except ValueError as error:
        raise CodingError(f"The stream of codes is damaged: {error}") from error
    order = _order(forms)
    contexts, laws = Contexts([forms[i] for i in order], [levels[i] for i in order]), AdaptiveLaws()
    columns = [np.empty((forms[i].columns, forms[i].rows), dtype=np.int64) for i in order]
    while count := contexts.matrices:
        here = contexts.next()
        places, runs = _runs(here)
        symbols, in_order = _take(coder, runs, laws)
        laws.learn(here[places], symbols)
        codes = np.empty_like(in_order)
        codes[places] = in_order
        start = 0
        for x in columns[:count]:
            x[contexts.column] = codes[start : start + x.shape[1]]
            start += x.shape[1]
        contexts.update(codes)
    if not coder.is_empty():
        raise CodingError("The stream of codes holds more than these matrices, or others.")
    matrices: list[Ints] = [np.zeros((x.rows, x.columns), dtype=np.int64) for x in forms]
    for place, x in zip(order, columns, strict=True):
        matrices[place] = x.T
    return matrices


def _checked(matrix: NDArray[np.integer], form: MatrixForm) -> Ints:
    """The transpose of a matrix, its columns each in one piece."""
    if matrix.shape != (form.rows, form.columns):
        raise CodingError(f"A matrix of shape {matrix.shape} was announced as {form.rows} by {form.columns}.")
    x = np.ascontiguousarray(matrix.T, dtype=np.int64)
    if x.size and int(np.abs(x).max()) >= LIMIT:
        raise CodingError(f"A code is {int(np.abs(x).max())}; the largest that can be stored is {LIMIT - 1}.")
    return x


def _order(forms: Sequence[MatrixForm]) -> list[int]:
    """Matrices with most columns first; those without a weight are left out."""
    return sorted((i for i, x in enumerate(forms) if x.rows * x.columns), key=lambda i: -forms[i].columns)


def _checked_stream(stream: bytes, matrices: int) -> tuple[list[int], NDArray[np.uint32]]:
    """Levels and words of a stream whose checksum is right."""
    if len(stream) < _HEADER.size:
        raise CodingError("The stream of codes is cut short.")
    magic, size, check = _HEADER.unpack_from(stream)
    payload = stream[_HEADER.size :]
    if magic != _MAGIC or len(payload) != size or zlib.crc32(payload) != check:
        raise CodingError("The stream of codes is damaged: its length or its checksum is not what was written.")
    if size < matrices or (size - matrices) % 4:
        raise CodingError("The stream of codes holds other matrices than these.")
    return list(payload[:matrices]), np.frombuffer(payload[matrices:], dtype="<u4").astype(np.uint32)


def _runs(contexts: Ints) -> tuple[Ints, list[_Run]]:
    """Places in the order of their contexts, and of every context that occurs its first place and the one behind."""
    counts = np.bincount(contexts, minlength=2 * CLASSES)
    stops = np.cumsum(counts).tolist()
    places = np.argsort(contexts.astype(np.uint8), kind="stable")
    return places, [(c, stops[c] - n, stops[c]) for c, n in enumerate(counts.tolist()) if n]


def _parts(codes: Ints, symbols: Ints, low: Ints, runs: Sequence[_Run], laws: AdaptiveLaws) -> list[_Part]:
    """What is coded of a column, in the order that ``_take`` takes it."""
    magnitude = np.abs(codes)
    parts = [(symbols[start:stop], laws[c]) for c, start, stop in runs]
    escaped = symbols == ESCAPE
    if escaped.any():
        beyond = (magnitude[escaped] >> low[escaped]) - LARGEST
        lengths = np.frexp(beyond.astype(np.float64))[1].astype(np.int64) - 1
        parts.append((lengths, _LENGTHS))
        for n, rest in zip(lengths.tolist(), beyond.tolist(), strict=True):
            parts += [(np.array([rest >> at]) & (1 << size) - 1, _uniform(size)) for at, size in _pieces(n)]
    for c, start, stop in runs:
        if bits := int(_LOW_BITS[c]):
            parts.append((magnitude[start:stop] & (1 << bits) - 1, _uniform(bits)))
    return [*parts, (codes[codes != 0] < 0, _uniform(1))]


def _take(coder: Any, runs: Sequence[_Run], laws: AdaptiveLaws) -> tuple[Ints, Ints]:
    """Symbols and codes of a column, in the order of their contexts."""
    symbols = np.concatenate([coder.decode(laws[c], stop - start) for c, start, stop in runs]).astype(np.int64)
    codes = symbols.copy()
    escaped = np.flatnonzero(symbols == ESCAPE)
    if len(escaped):
        lengths = coder.decode(_LENGTHS, len(escaped)).tolist()
        rest = [sum(int(coder.decode(_uniform(size), 1)[0]) << at for at, size in _pieces(n)) for n in lengths]
        codes[escaped] = [(1 << n) + x + LARGEST for n, x in zip(lengths, rest, strict=True)]
    for c, start, stop in runs:
        if bits := int(_LOW_BITS[c]):
            codes[start:stop] = (codes[start:stop] << bits) + coder.decode(_uniform(bits), stop - start)
    signed = np.flatnonzero(codes)
    codes[signed] *= 1 - 2 * coder.decode(_uniform(1), len(signed)).astype(np.int64)
    return symbols, codes


def _pieces(length: int) -> list[tuple[int, int]]:
    """Where the bits of a long number are cut, and how long each piece is; ANS takes so many at once."""
    return [(at, min(_PIECE, length - at)) for at in range(0, length, _PIECE)]


@cache
def _uniform(bits: int) -> Law:
    """The law of numbers of so many bits that are all as likely."""
    return constriction.stream.model.Uniform(1 << bits)


def _words(parts: Sequence[_Part]) -> bytes:
    """Words of ANS, which gives back first what went in last."""
    coder = _Coder()
    for symbols, each in reversed(parts):
        coder.encode_reverse(symbols.astype(np.int32), each)
    return np.asarray(coder.get_compressed(), dtype="<u4").tobytes()
