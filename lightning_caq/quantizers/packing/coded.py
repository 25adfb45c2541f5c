"""Coded weights: the codes of all layers in one entropy-coded stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.packing.contexts import MatrixForm
from lightning_caq.quantizers.packing.entropy import CodingError, decode, encode
from lightning_caq.quantizers.packing.trellis_codes import trellis_codes, trellis_values

MULTIPLES = 1 << 29
"""Multiples of the step are below this in magnitude."""


def encode_weights(codes: Sequence[Tensor], transposed: Sequence[int]) -> bytes:
    """One stream of the codes of all layers.

    Args:
        codes: Multiples of the step of each layer, whole numbers in the shape of its weight.
        transposed: Of each layer its groups if it is a transposed convolution, otherwise 0.

    Returns:
        A bit a layer that says whether its codes are on the trellis, in whole bytes, and the stream of ``encode``.

    Raises:
        CodingError: If a code is too large.

    Example:
        >>> codes = torch.tensor([[0, 1, -3], [2, 100, 0]])
        >>> torch.equal(decode_weights(encode_weights([codes], [0]), [(2, 3)], [0])[0].long(), codes)
        True
    """
    matrices, forms = [], []
    for weight, groups in zip(codes, transposed, strict=True):
        rows = to_matrix(_layer(weight.shape, groups), weight.detach().cpu().long()).flatten(0, 1)
        if rows.numel() and int(rows.abs().max()) >= MULTIPLES:
            raise CodingError(f"A code is {int(rows.abs().max())}; the largest that can be stored is {MULTIPLES - 1}.")
        dependent = trellis_codes(rows)
        matrices.append((rows if dependent is None else dependent).numpy())
        forms.append(_form(weight.shape, groups, dependent is not None))
    flags = np.packbits(np.array([form.trellis for form in forms], dtype=bool)).tobytes()
    return flags + encode(matrices, forms)


def decode_weights(stream: bytes, shapes: Sequence[tuple[int, ...]], transposed: Sequence[int]) -> list[Tensor]:
    """The codes that ``encode_weights`` was given, int32.

    Args:
        stream: The stream.
        shapes: Shapes of the weights.
        transposed: As there.

    Raises:
        CodingError: If the stream is cut, was changed, or holds other weights.
    """
    split = math.ceil(len(shapes) / 8)
    flags = np.unpackbits(np.frombuffer(stream[:split], dtype=np.uint8)).astype(bool)
    if len(flags) < len(shapes):
        raise CodingError("The stream of codes is cut short.")
    kinds = list(zip(shapes, transposed, flags.tolist(), strict=False))
    matrices = decode(stream[split:], [_form(*kind) for kind in kinds])
    weights = []
    for rows, (shape, groups, trellis) in zip(map(torch.from_numpy, matrices), kinds, strict=True):
        multiples = (trellis_values(rows) if trellis else rows).to(torch.int32)
        weights.append(from_matrix(_layer(shape, groups), multiples.contiguous()).contiguous())
    return weights


def layer_bits(codes: Sequence[Tensor], transposed: Sequence[int]) -> list[float]:
    """Bits a code of each layer: its share of the stream of all in whole bytes, by its size if it were coded alone."""
    total = len(encode_weights(codes, transposed))
    alone = [len(encode_weights([x], [groups])) for x, groups in zip(codes, transposed, strict=True)]
    ends = [0, *(round(total * size / sum(alone)) for size in accumulate(alone))]
    return [8.0 * (stop - start) / max(x.numel(), 1) for (start, stop), x in zip(pairwise(ends), codes, strict=True)]


def _layer(shape: Sequence[int], groups: int) -> Layer:
    """What is to be known of a layer to make a matrix of its weight; groups lie one below the other in any case."""
    return Layer("", "conv_transpose" if groups else "linear", tuple(shape), groups=max(groups, 1))


def _form(shape: Sequence[int], groups: int, trellis: bool) -> MatrixForm:
    rows = shape[1] * groups if groups else shape[0]
    count, period = math.prod(shape), math.prod(shape[2:])
    return MatrixForm(rows, count // rows if rows else 0, period, trellis)
