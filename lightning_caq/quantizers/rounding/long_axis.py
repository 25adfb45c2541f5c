"""Long-axis rounding: every weight goes down or up such that the errors of all layers together avoid steep directions.

With n weights to round and k ≪ n steep directions there are far more choices than conditions: rounding errors can be
made to cancel along every steep direction, at the price of a few weights that are not rounded to the nearest value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel

_BLOCK = 256
_SWEEPS = 20
_NOISE = 1e-10  # gains below this part of their own terms are rounding noise, which could go back and forth for ever


def round_long_axis(weights: Sequence[Tensor], grids: Sequence[Grid], model: QuadraticModel) -> list[Tensor]:
    """Codes of all layers that make the quadratic model small, each one of the two next to its weight.

    Starts with the nearest values and exchanges one at a time for the value on the weight's other side, until no
    exchange lowers gᵀΔ + ½ Σ_j λ_j (v_jᵀΔ)² + ½ μ ‖Δ‖².

    Args:
        weights: The float weights of all layers, in the order of the model's.
        grids: Their grids.
        model: The quadratic model.

    Returns:
        Codes, uint8 in the shapes of the weights.

    Example:
        >>> w, grid = torch.tensor([[0.4, 0.4]]), Grid(2, torch.ones(1, 1), torch.zeros(1, 1))
        >>> steep = torch.full((2, 1), 0.5**0.5)  # only the sum of the two matters
        >>> round_long_axis([w], [grid], QuadraticModel((2,), torch.ones(1), steep, 0.01, torch.zeros(2)))
        [tensor([[1, 0]], dtype=torch.uint8)]
    """
    nearest, other, errors, steps = [], [], [], []
    for weight, grid in zip(weights, grids, strict=True):
        w = weight.detach().float()
        code = grid.codes(w)
        value = grid.values(code)
        beside = (code + (w - value).sign()).clamp(min=0).minimum(grid.top)
        nearest.append(code)
        other.append(beside)
        errors.append((value.double() - w.double()).flatten().cpu())
        steps.append((grid.per_weight(w.shape)[0].double() * (beside - code).double()).flatten().cpu())
    flipped = exchanges(torch.cat(errors), torch.cat(steps), model).split(model.sizes)
    return [
        torch.where(mask.reshape(a.shape).to(a.device), b, a).to(torch.uint8)
        for mask, a, b in zip(flipped, nearest, other, strict=True)
    ]


def exchanges(errors: Tensor, steps: Tensor, model: QuadraticModel) -> Tensor:
    """Which weights to move away from their nearest values.

    Coordinate descent: a move of weight i by d changes the model by d (g_i + Σ_j λ_j v_ij p_j + μ Δ_i) +
    ½ d² (Σ_j λ_j v_ij² + μ), where p = VᵀΔ is kept up to date, k numbers. Weights are visited in blocks, those nearest
    the middle between their two values first, so that the cheapest moves are spent before dearer ones; in a block the
    best move is made until none is left. Sweeps are repeated until one changes nothing.

    Args:
        errors: Δ of the nearest values, shape (n,), float64.
        steps: What a move adds to it, 0 where there is no other value, shape (n,), float64.
        model: The quadratic model.

    Returns:
        Shape (n,), bool.
    """
    delta, step = errors.numpy().copy(), steps.numpy().copy()
    values, along = model.values.double().numpy(), model.along(errors).numpy().copy()
    vectors, gradient, mu = model.vectors.numpy(), model.gradient.double().numpy(), model.stiffness
    order = np.argsort(step * (2 * delta + step), kind="stable")  # growth of ‖Δ‖²
    order = order[step[order] != 0]
    for _ in range(_SWEEPS):
        moves = 0
        for block in np.split(order, range(_BLOCK, len(order), _BLOCK)):
            v = vectors[block].astype(np.float64)
            d = step[block]
            slope = gradient[block] + v @ (values * along) + mu * delta[block]
            bend = 0.5 * d * d * (v * v @ values + mu)
            gain = d * slope + bend
            while len(gain) and gain[i := int(gain.argmin())] < -_NOISE * abs(bend[i]):
                move = d[i]
                along += v[i] * move
                slope += v @ (values * v[i]) * move
                slope[i] += mu * move
                d[i] = -move
                gain = d * slope + bend
                moves += 1
            delta[block] += np.where(d == step[block], 0.0, step[block])
            step[block] = d
        if not moves:
            break
    return torch.from_numpy(step != steps.numpy())
