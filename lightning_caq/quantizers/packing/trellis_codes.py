"""Trellis codes: what multiples of a step are stored as if they were chosen on the trellis, one bit less a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.packing.contexts import NEXT_STATE


def trellis_codes(values: Tensor) -> Tensor | None:
    """The codes that multiples of the step are stored as; ``None`` if they do not lie on the trellis.

    Args:
        values: Multiples of the step, whole numbers, shape (rows, columns).

    Returns:
        Codes k, int64: values are 2 k − sign(k) where the state is odd, 2 k where it is even.

    Example:
        >>> trellis_codes(torch.tensor([[2, 0, 1]])), trellis_codes(torch.tensor([[1, 0, 0]]))
        (tensor([[1, 0, 1]]), None)
    """
    whole, following = values.long().T, torch.from_numpy(NEXT_STATE).to(values.device)
    state = torch.zeros(len(values), dtype=torch.long, device=values.device)
    codes = torch.empty_like(whole)
    for j, column in enumerate(whole):
        odd = state & 1
        if bool(((column & 1 != odd) & (column != 0) | (column & 1 > odd)).any()):
            return None
        codes[j] = (column + odd * column.sign()) // 2
        state = following[state, codes[j] & 1]
    return codes.T


def trellis_values(codes: Tensor) -> Tensor:
    """The multiples of the step that codes stand for; the inverse of ``trellis_codes``.

    Example:
        >>> trellis_values(torch.tensor([[1, 0, 1]]))
        tensor([[2, 0, 1]])
    """
    following = torch.from_numpy(NEXT_STATE).to(codes.device)
    state = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    values = torch.empty_like(codes.T)
    for j, column in enumerate(codes.T.long()):
        values[j] = 2 * column - (state & 1) * column.sign()
        state = following[state, column & 1]
    return values.T
