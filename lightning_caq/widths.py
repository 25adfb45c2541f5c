"""Widths: the bits of a layer, and what they take to store."""

from __future__ import annotations

from typing import TypeVar

Width = int | tuple[int, ...]
"""One bit-width for all weights of a layer, or one for each of its output channels."""

W = TypeVar("W", bound=Width)

WIDTH_BITS = 3  # a width of 1 to 8 bits less one


def average_bits(width: Width) -> int | float:
    """Bits a weight on average; every channel has as many weights.

    Example:
        >>> average_bits(3), average_bits((2, 2, 4, 2))
        (3, 2.5)
    """
    return width if isinstance(width, int) else sum(width) / len(width)


def code_bytes(width: Width, weights: int) -> int:
    """Bytes of a layer's codes: channels of one width lie together, and each width begins with a new byte.

    Args:
        width: The layer's bits.
        weights: Number of its weights.

    Example:
        >>> code_bytes(3, 9), code_bytes((2, 4, 2), 9)
        (4, 4)
    """
    if isinstance(width, int):
        return -(-weights * width // 8)
    each = weights // len(width)
    return sum(-(-width.count(b) * each * b // 8) for b in set(width))


def width_bits(width: Width) -> int:
    """Bits that say which channel has which width, whole bytes; nothing where all have the same.

    Example:
        >>> width_bits(3), width_bits((2, 4, 2))
        (0, 16)
    """
    return 0 if isinstance(width, int) else -(-len(width) * WIDTH_BITS // 8) * 8
