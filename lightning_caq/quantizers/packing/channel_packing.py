"""Codes of channels that differ in their bits, packed: channels of one width lie together, the narrowest first."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.packing.bit_packing import pack, packed_bytes, unpack
from lightning_caq.sizes import WIDTH_BITS


def pack_channels(codes: Tensor, channel_bits: Tensor) -> Tensor:
    """Pack codes into bytes, each channel at its own bit-width.

    Args:
        codes: Codes of a weight, in its shape.
        channel_bits: Bit-widths, 1 to 8, in the shape of one scale a channel.

    Returns:
        The bytes, uint8; each bit-width begins with a new one.

    Example:
        >>> pack_channels(torch.tensor([[1, 2], [9, 15]]), torch.tensor([[2], [4]])).tolist()
        [9, 249]
    """
    rows, bits = _rows(codes, channel_bits), channel_bits.flatten()
    return torch.cat([pack(rows[bits == b], b) for b in bits.unique().tolist()])


def unpack_channels(packed: Tensor, channel_bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack_channels`` was given, uint8.

    Args:
        packed: The bytes.
        channel_bits: Bit-widths, as there.
        shape: Shape of the weight.

    Raises:
        ValueError: If the bytes are not those of such codes.

    Example:
        >>> unpack_channels(torch.tensor([9, 249], dtype=torch.uint8), torch.tensor([[2], [4]]), (2, 2)).tolist()
        [[1, 2], [9, 15]]
    """
    moved = _rows(torch.empty(shape, dtype=torch.uint8, device=packed.device), channel_bits)
    rows, bits = torch.empty(moved.shape, dtype=torch.uint8, device=packed.device), channel_bits.flatten()
    start = 0
    for b in bits.unique().tolist():
        count = int((bits == b).sum()) * rows[0].numel()
        stop = start + packed_bytes(count, b)
        rows[bits == b] = unpack(packed[start:stop], b, count).view(-1, *rows.shape[1:])
        start = stop
    if start != len(packed):
        raise ValueError(f"Codes of these widths take {start} bytes; got {len(packed)}.")
    return rows.movedim(0, _axis(channel_bits)).contiguous()


def pack_widths(channel_bits: Tensor) -> Tensor:
    """Bit-widths of channels, three bits each; uint8.

    Example:
        >>> pack_widths(torch.tensor([[2], [4]])).tolist()
        [25]
    """
    return pack(channel_bits.flatten() - 1, WIDTH_BITS)


def unpack_widths(packed: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
    """The bit-widths that ``pack_widths`` was given, uint8, in the shape of one scale a channel.

    Raises:
        ValueError: If the bytes are not those of so many channels.
    """
    return (unpack(packed, WIDTH_BITS, int(torch.Size(channel_shape).numel())) + 1).view(channel_shape)


def _axis(channel_bits: Tensor) -> int:
    """The dimension that channels lie along."""
    return next((d for d, size in enumerate(channel_bits.shape) if size > 1), 0)


def _rows(weight: Tensor, channel_bits: Tensor) -> Tensor:
    """The weight, channels first."""
    return weight.movedim(_axis(channel_bits), 0)
