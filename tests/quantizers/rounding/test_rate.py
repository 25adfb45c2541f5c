"""Rounding with the rate in it: codes against brute force, and fewer bits at the same error."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_caq.quantizers.rounding.moments import damped
from lightning_caq.quantizers.rounding.rate import inverse_factors, magnitude_bits, refit_step, round_rate


def correlated(groups: int, outputs: int, columns: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(groups, 500, columns, generator=draws) @ torch.randn(columns, columns, generator=draws)
    return torch.randn(groups, outputs, columns, generator=draws), z.mT @ z / 500


def error(w: Tensor, values: Tensor, h: Tensor) -> float:
    e = (values - w).double()
    return float(((e @ h.double()) * e).sum())


def test_factors_multiply_to_the_damped_inverse() -> None:
    _, h = correlated(2, 1, 6)
    u = inverse_factors(h).double()
    torch.testing.assert_close(u.mT @ u, damped(h).inverse(), rtol=1e-3, atol=1e-4)
    assert not u.tril(-1).any()


def test_without_a_price_and_without_curvature_codes_are_nearest() -> None:
    w, _ = correlated(2, 3, 40)
    assert torch.equal(round_rate(w, None, 0.3, slope=0.0), (w / 0.3).round())


def test_each_weight_alone_takes_the_code_of_least_error_and_price() -> None:
    w = torch.linspace(-4, 4, 4001)[None, None]
    codes = round_rate(w, None, 1.0, slope=0.2)
    prices = 0.2 * magnitude_bits(round_rate(w, None, 1.0, slope=0.2).abs().flatten())
    for x, code in zip(w.flatten().tolist()[::97], codes.flatten().tolist()[::97], strict=True):
        costs = {k: (abs(x) - k) ** 2 + float(prices[k]) for k in range(6)}
        assert costs[int(abs(code))] < min(costs.values()) + 0.02, x  # prices moved a little in the last pass


def test_feedback_beats_nearest_rounding_and_comes_near_the_best_of_all_codes() -> None:
    w, h = correlated(1, 30, 6)
    nearest = (w / 0.7).round()
    shifts = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    e = 0.7 * (nearest[0, :, None] + shifts) - w[0, :, None]
    best = float(((e @ h[0]) * e).sum(2).amin(1).sum())
    found = error(w, 0.7 * round_rate(w, h, 0.7, slope=0.0), h)
    assert best <= found < 0.85 * error(w, 0.7 * nearest, h)
    assert found < 2.5 * best


def test_a_price_is_worth_more_bits_than_a_larger_step() -> None:
    w, h = correlated(1, 256, 48)
    sizes = []
    for step, slope in ((1.5, 0.0), (1.3, 0.1)):
        codes = round_rate(w, h, step, slope)
        counts = torch.unique(codes, return_counts=True)[1] / codes.numel()
        step = refit_step(w, codes, h, step)
        bits = -float((counts * counts.log2()).sum())
        sizes.append(bits + 0.5 * float(torch.tensor(error(w, step * codes, h)).log2()))  # at the same error
    assert sizes[1] < sizes[0] - 0.01


def test_groups_are_rounded_apart() -> None:
    w, h = correlated(3, 5, 8)
    together = round_rate(w, h, 0.2, slope=0.0)
    for g in range(3):
        assert torch.equal(together[g : g + 1], round_rate(w[g : g + 1], h[g : g + 1], 0.2, slope=0.0))


def test_the_refitted_step_is_the_best() -> None:
    w, h = correlated(2, 4, 10)
    codes = round_rate(w, h, 0.5)
    best = refit_step(w, codes, h, 0.5)
    errors = [error(w, s * codes, damped(h)) for s in (0.99 * best, best, 1.01 * best)]
    assert min(errors) == errors[1]
    assert refit_step(w, torch.zeros_like(w), h, 0.5) == 0.5
