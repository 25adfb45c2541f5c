"""Zero points of groups, packed: multiples of one half within codes of b bits take b + 1 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.packing.bit_packing import pack, packed_bytes, unpack


def pack_zero_points(zero_point: Tensor, bits: int) -> Tensor:
    """Pack zero points into bytes.

    Args:
        zero_point: Multiples of one half from 0 to 2^bits − 1, any shape.
        bits: Bit-width of the codes, 1 to 8.

    Returns:
        The bytes, uint8, ⌈n (bits + 1) / 8⌉ for n zero points; of nine bits the highest ones follow the others.

    Raises:
        ValueError: If a zero point is none of these.

    Example:
        >>> pack_zero_points(torch.tensor([1.5, 0.0]), 2)
        tensor([3], dtype=torch.uint8)
    """
    doubled = (2 * zero_point).round().long()
    if not torch.equal(doubled / 2, zero_point) or int(doubled.min()) < 0 or int(doubled.max()) > 2 * (2**bits - 1):
        raise ValueError(f"Zero points of groups are multiples of one half from 0 to {2**bits - 1}.")
    if bits < 8:
        return pack(doubled, bits + 1)
    return torch.cat([pack(doubled & 255, 8), pack(doubled >> 8, 1)])


def unpack_zero_points(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The zero points that ``pack_zero_points`` was given, float32.

    Raises:
        ValueError: If the bytes are not those of such zero points.

    Example:
        >>> unpack_zero_points(torch.tensor([3], dtype=torch.uint8), 2, (2,))
        tensor([1.5000, 0.0000])
    """
    count = torch.Size(shape).numel()
    if packed.shape != (packed_bytes(count, bits + 1),):
        raise ValueError(f"{count} zero points take {packed_bytes(count, bits + 1)} bytes; got {list(packed.shape)}.")
    if bits < 8:
        doubled = unpack(packed, bits + 1, count).float()
    else:
        doubled = unpack(packed[:count], 8, count).float() + 256 * unpack(packed[count:], 1, count).float()
    return (doubled / 2).reshape(shape)
