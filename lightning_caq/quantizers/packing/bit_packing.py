"""Bit-packing: codes of 1 to 8 bits in as few bytes as they need.

A width is cut into powers of two, such as 6 = 4 + 2. Each part is packed for itself: parts of w bits lie 8 / w to a
byte, and the codes that share a byte are far apart, so that every step is one operation on long, contiguous rows. What
does not fill rows of eight codes follows bit by bit at the end; n codes of b bits take ⌈n b / 8⌉ bytes exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take.

    Example:
        >>> packed_bytes(3, 3)
        2
    """
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: Whole numbers from 0 to 2^bits − 1, any shape and dtype.
        bits: Bit-width, 1 to 8.

    Returns:
        The bytes, uint8, shape (⌈n · bits / 8⌉,).

    Raises:
        ValueError: If the width is not allowed, or a code does not fit into it.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0]), bits=2)
        tensor([57], dtype=torch.uint8)
    """
    _check(bits)
    if codes.numel():
        low, high = (int(x) for x in codes.detach().aminmax())
        if low < 0 or high >= 2**bits:
            raise ValueError(f"Codes of {bits} bits go from 0 to {2**bits - 1}; got {low} to {high}.")
    flat = codes.detach().reshape(-1).to(torch.uint8)
    whole = len(flat) // 8 * 8
    packed = flat.new_empty(packed_bytes(len(flat), bits))
    for part, offset, width in _parts(packed, whole, bits):
        scratch = torch.empty_like(part)  # one for all steps: memory that is fresh is slow
        for lane, row in enumerate(flat[:whole].view(8 // width, -1)):
            _move(row, width * lane - offset, (2**width - 1) << (width * lane), out=scratch if lane else part)
            if lane:
                part |= scratch
    if whole < len(flat):
        packed[whole * bits // 8 :] = _pack_bitwise(flat[whole:], bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that ``pack`` was given.

    Args:
        packed: The bytes, uint8.
        bits: Bit-width, 1 to 8.
        count: Number of codes, n.

    Returns:
        The codes, uint8, shape (n,).

    Raises:
        ValueError: If the width is not allowed, or the bytes are not those of ``count`` codes.

    Example:
        >>> unpack(pack(torch.tensor([5, 0, 7]), bits=3), bits=3, count=3)
        tensor([5, 0, 7], dtype=torch.uint8)
    """
    _check(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes; "
            f"got {packed.dtype} of shape {list(packed.shape)}."
        )
    whole = count // 8 * 8
    codes = packed.new_empty(count)
    for part, offset, width in _parts(packed, whole, bits):
        scratch = torch.empty_like(part)
        for lane, row in enumerate(codes[:whole].view(8 // width, -1)):
            _move(part, offset - width * lane, (2**width - 1) << offset, out=scratch if offset else row)
            if offset:
                row |= scratch
    if whole < count:
        codes[whole:] = _unpack_bitwise(packed[whole * bits // 8 :], bits, count - whole)
    return codes


def _parts(packed: Tensor, whole: int, bits: int) -> Iterator[tuple[Tensor, int, int]]:
    """The packed parts of ``whole`` codes: bytes, position of their lowest bit in the code, and width."""
    offset = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield packed[whole * offset // 8 : whole * (offset + width) // 8], offset, width
            offset += width


def _move(numbers: Tensor, places: int, mask: int, out: Tensor) -> None:
    """Bytes shifted to the left, or to the right by negative places, and masked."""
    if places > 0:
        torch.bitwise_left_shift(numbers, places, out=out)
    elif places < 0:
        torch.bitwise_right_shift(numbers, -places, out=out)
    torch.bitwise_and(out if places else numbers, mask, out=out)


def _pack_bitwise(codes: Tensor, bits: int) -> Tensor:
    stream = (codes[:, None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = F.pad(stream.flatten(), (0, -stream.numel() % 8))
    return (stream.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(1, dtype=torch.uint8)


def _unpack_bitwise(packed: Tensor, bits: int, count: int) -> Tensor:
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    stream = stream.flatten()[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(1, dtype=torch.uint8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is not allowed; codes have 1 to 8 bits.")
