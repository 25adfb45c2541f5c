"""Trellis: dependent quantization inside error feedback, each weight's values chosen with those before it in its row.

Two quantizers take turns: one has the even multiples of the step, the other the odd ones and zero. Which is in use
follows from the parities of the codes so far, a machine of eight states, so that the decoder knows it too. Together
they are as fine as one quantizer of half their step at nearly the bits of a coarse one: of the 0.255 bits that scalar
quantization is off the limit, about half is won (trellis-coded quantization, Marcellin & Fischer 1990; dependent
quantization, ISO/IEC 15938-17). The Viterbi algorithm keeps for every state the best row of codes that leads there,
each with the errors that its own columns passed on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_caq.quantizers.packing.contexts import NEXT_STATE
from lightning_caq.quantizers.rounding.rate import LARGEST, inverse_factors, magnitude_bits

STATES = len(NEXT_STATE)
SLOPE = 0.25
"""λ over the mean squared error that a column cannot pass on, in squared steps a bit."""

SCALAR_STEP = 1.6
"""Step of scalar rounding that makes about the squared error of the trellis with step 1."""

_BLOCK = 32
_PASSES = 2
_LANES = 1 << 24  # codes that are kept at once, a state each: 64 MB


def round_trellis(matrices: Tensor, curvature: Tensor, step: float, slope: float = SLOPE) -> Tensor:
    """Multiples of the step for a layer's weights.

    Args:
        matrices: The weight, shape (groups, outputs, columns).
        curvature: E[z zᵀ], shape (groups, columns, columns).
        step: The step.
        slope: λ, see ``SLOPE``.

    Returns:
        Whole numbers in the shape of ``matrices``, float32; the weight is step · numbers. ``trellis_codes`` gives the
        codes that stand for them.

    Example:
        >>> w = torch.tensor([[[2.1, 0.2, 0.9]]])
        >>> round_trellis(w, torch.eye(3)[None], 1.0, slope=0.0)
        tensor([[[2., 0., 1.]]])
    """
    x, factors = matrices.float() / step, inverse_factors(curvature)
    weight = 1 / factors.diagonal(dim1=1, dim2=2).square()
    mean = weight.log().mean().exp()
    guess = magnitude_bits((x.abs() / 2).round().flatten())
    bits = torch.stack([guess, guess])
    outputs = max(1, _LANES // (STATES * x.shape[0] * x.shape[2]))
    for _ in range(_PASSES):
        parts = [_viterbi(rows, factors, weight, slope * mean * bits) for rows in x.split(outputs, dim=1)]
        values, codes, odd = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        bits = torch.stack([magnitude_bits(codes[odd == quantizer].abs()) for quantizer in (0, 1)])
    return values


def _viterbi(x: Tensor, factors: Tensor, weight: Tensor, prices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiples, codes and quantizers of some rows, each of shape (groups, outputs, columns).

    Args:
        x: The weight in steps, shape (groups, outputs, columns).
        factors: Inverse factors of its groups.
        weight: What a squared error of a column costs, shape (groups, columns).
        prices: λ times the bits of magnitudes in each quantizer, shape (2, LARGEST + 1).
    """
    groups, outputs, columns = x.shape
    lanes = _Lanes(groups * outputs, prices)
    paths = x.movedim(2, 0).reshape(columns, -1, 1).repeat(1, 1, STATES).view(columns, -1)
    origins = torch.empty(columns, groups * outputs, STATES, dtype=torch.uint8, device=x.device)
    codes = torch.empty(columns, groups * outputs, STATES, dtype=torch.int32, device=x.device)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, ancestors = paths[start:stop].clone(), torch.arange(paths.shape[1], device=x.device)
        for j in range(start, stop):
            cost = weight[:, j].repeat_interleave(outputs)[:, None, None]
            origins[j], codes[j], errors, parents = lanes.step(block[j - start], cost)
            block, ancestors = block.index_select(1, parents), ancestors[parents]
            errors = errors.view(groups, -1) / factors[:, j, j, None]
            ahead = block[j - start + 1 :].view(stop - j - 1, groups, outputs * STATES)
            ahead.addcmul_(factors[:, j, j + 1 : stop].T[:, :, None], errors[None], value=-1)
            block[j - start] = errors.flatten()
        if stop < columns:
            paths[stop:] = paths[stop:].index_select(1, ancestors)
            ahead, passed = (
                paths[stop:].view(columns - stop, groups, outputs * STATES),
                block.view(stop - start, groups, -1),
            )
            for g in range(groups):
                ahead[:, g] -= factors[g, start:stop, stop:].T @ passed[:, g]
    found, odd = _trace(lanes.total.argmin(1), origins, codes)
    shape = (columns, groups, outputs)
    found, odd = found.view(shape).movedim(0, 2), odd.view(shape).movedim(0, 2)
    return 2 * found - odd * found.sign(), found, odd


class _Lanes:
    """The best way into each state of every row, and one step of it."""

    def __init__(self, rows: int, prices: Tensor) -> None:
        device = prices.device
        following = torch.from_numpy(NEXT_STATE)
        # Two ways lead into each state: from which state, and with which parity.
        ways = [(following == state).nonzero() for state in range(STATES)]
        self._ways = torch.stack([2 * way[:, 0] + way[:, 1] for way in ways]).to(device)
        odd = torch.arange(STATES, device=device) & 1
        self._odd = odd[:, None].float()
        # Smallest magnitudes of even and of odd codes, in steps; the next ones follow four apart. Zero comes last.
        self._first = torch.stack([torch.where(odd > 0, -1.0, 0.0), torch.where(odd > 0, 1.0, 2.0)], 1)
        self._least = torch.tensor([1.0, 0.0], device=device).expand(STATES, 2)
        self._prices, self._price_of_zero = prices.flatten(), prices[odd, 0]
        self._offsets = (odd * (LARGEST + 1))[:, None]
        self._base = (torch.arange(rows, device=device) * STATES)[:, None]
        self.total = torch.full((rows, STATES), 1e30, device=device)
        self.total[:, 0] = 0

    def step(self, paths: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Round one column of every way.

        Returns:
            The state that each way comes from, its code, its error, and the place of the way it goes on from.
        """
        x = paths.view(-1, STATES)
        size = x.abs()
        units = torch.maximum(((size[:, :, None] - self._first) / 4).round_(), self._least)
        multiples = units.mul_(4).add_(self._first)
        codes = (multiples + self._odd) / 2
        errors = size[:, :, None] - multiples
        cost = weight * errors.square() + self._prices[codes.long().clamp_(max=LARGEST) + self._offsets]
        zero = weight[:, :, 0] * size.square() + self._price_of_zero
        dropped = zero < cost[:, :, 0]
        cost[:, :, 0] = torch.where(dropped, zero, cost[:, :, 0])
        codes[:, :, 0].masked_fill_(dropped, 0)
        errors[:, :, 0] = torch.where(dropped, size, errors[:, :, 0])
        total = (cost + self.total[:, :, None]).flatten(1)[:, self._ways]  # (rows, states, 2)
        second = total[:, :, 1] < total[:, :, 0]
        self.total = torch.where(second, total[:, :, 1], total[:, :, 0])
        self.total -= self.total.amin(1, keepdim=True)  # only differences count, and sums would lose them
        way = torch.where(second, self._ways[:, 1], self._ways[:, 0])
        sign = torch.where(x < 0, -1.0, 1.0)[:, :, None]
        codes, errors = ((y * sign).flatten(1).gather(1, way) for y in (codes, errors))
        origin = way >> 1
        return origin.to(torch.uint8), codes.int(), errors.flatten(), (origin + self._base).flatten()


def _trace(state: Tensor, origins: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and quantizers of the best ways, walked back from their last states; shape (columns, rows)."""
    best = torch.empty(codes.shape[:2], device=codes.device)
    odd = torch.empty(codes.shape[:2], device=codes.device)
    for j in reversed(range(len(codes))):
        best[j] = codes[j].gather(1, state[:, None])[:, 0].float()
        state = origins[j].gather(1, state[:, None])[:, 0].long()
        odd[j] = state & 1
    return best, odd
