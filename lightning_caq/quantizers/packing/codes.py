"""Codes of a weight, packed at the bit-width of its values, or of each of its channels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Size, Tensor

from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.grids.stepped import SteppedGrid
from lightning_caq.quantizers.grids.values import Values
from lightning_caq.quantizers.packing.bit_packing import pack, unpack
from lightning_caq.quantizers.packing.channel_packing import pack_channels, unpack_channels
from lightning_caq.quantizers.packing.coded import decode_weights, encode_weights


def pack_codes(codes: Tensor, values: Values) -> Tensor:
    """Pack the codes of a weight into bytes.

    Args:
        codes: The codes, in the shape of the weight.
        values: The values that they stand for.

    Returns:
        The bytes, uint8, one-dimensional: ⌈n b / 8⌉ for the n codes of each bit-width b; codes without a bit-width
        are entropy-coded.

    Example:
        >>> import torch
        >>> grid = Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
        >>> pack_codes(torch.tensor([[1, 2, 3, 0]]), grid)
        tensor([57], dtype=torch.uint8)
    """
    if isinstance(values, SteppedGrid):
        return torch.from_numpy(np.frombuffer(encode_weights([codes], [values.transposed]), dtype=np.uint8).copy())
    widths = _channel_bits(values)
    return pack(codes, values.bits) if widths is None else pack_channels(codes, widths)


def unpack_codes(packed: Tensor, values: Values, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack_codes`` was given.

    Args:
        packed: The bytes.
        values: The values that the codes stand for.
        shape: Shape of the weight.

    Returns:
        The codes, uint8; int32 where they have no bit-width.

    Raises:
        ValueError: If the bytes are not those of such codes.

    Example:
        >>> import torch
        >>> grid = Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
        >>> unpack_codes(torch.tensor([57], dtype=torch.uint8), grid, (2, 2))
        tensor([[1, 2],
                [3, 0]], dtype=torch.uint8)
    """
    if isinstance(values, SteppedGrid):
        return decode_weights(packed.cpu().numpy().tobytes(), [shape], [values.transposed])[0]
    widths = _channel_bits(values)
    if widths is not None:
        return unpack_channels(packed, widths, shape)
    return unpack(packed, values.bits, Size(shape).numel()).view(shape)


def _channel_bits(values: Values) -> Tensor | None:
    """Bit-widths of the channels where they differ."""
    return values.channel_bits if isinstance(values, Grid) else None
