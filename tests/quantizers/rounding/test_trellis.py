"""The trellis: its ways against brute force, what it wins over scalar rounding, and its codes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_caq.quantizers.packing.contexts import NEXT_STATE, MatrixForm
from lightning_caq.quantizers.packing.entropy import encode
from lightning_caq.quantizers.packing.trellis_codes import trellis_codes, trellis_values
from lightning_caq.quantizers.rounding.rate import round_rate
from lightning_caq.quantizers.rounding.trellis import SCALAR_STEP, round_trellis


def paths(codes: tuple[int, ...]) -> list[int]:
    """Multiples of the step by the rule of the standard, one state after the other."""
    state, values = 0, []
    for k in codes:
        values.append(2 * k - (state & 1) * ((k > 0) - (k < 0)))
        state = int(NEXT_STATE[state, k & 1])
    return values


def laplace(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.Laplace(0.0, 1.0).sample(torch.Size(shape))


def test_without_correlations_the_best_of_all_sequences_is_chosen() -> None:
    draws = torch.Generator().manual_seed(1)
    every = [torch.tensor(paths(codes)).float() for codes in itertools.product(range(-2, 3), repeat=5)]
    for _ in range(20):
        w = 1.2 * torch.randn(5, generator=draws)
        found = round_trellis(w.view(1, 1, 5), torch.eye(5)[None], 1.0, slope=0.0).flatten()
        least = min(float((w - x).square().sum()) for x in every)
        assert float((w - found).square().sum()) <= least + 1e-5


def test_values_and_codes_stand_for_each_other() -> None:
    w = laplace(1, 32, 50)
    values = round_trellis(w, torch.eye(50)[None], 0.3)[0]
    codes = trellis_codes(values)
    assert codes is not None
    assert torch.equal(trellis_values(codes).float(), values)
    assert codes[0].tolist()
    assert paths(tuple(codes[0].tolist())) == values[0].tolist()


def test_values_off_the_trellis_have_no_codes() -> None:
    values = round_trellis(laplace(1, 8, 30), torch.eye(30)[None], 0.2)[0]
    values[3, 7] += 1
    assert trellis_codes(values) is None


def test_at_the_same_bits_the_error_is_smaller_than_that_of_scalar_rounding() -> None:
    w, h = laplace(1, 128, 160), torch.eye(160)[None]
    values, scalar = round_trellis(w, h, 0.6), round_rate(w, h, 0.6 * SCALAR_STEP)
    codes = trellis_codes(values[0])
    assert codes is not None
    bits = [
        8 * len(encode([c.numpy()], [MatrixForm(128, 160, 1, on)])) / w.numel()
        for c, on in ((codes, True), (scalar[0].long(), False))
    ]
    errors = [float((s * v - w).square().mean()) for s, v in ((0.6, values), (0.6 * SCALAR_STEP, scalar))]
    gained = torch.tensor(errors).log2().diff() / 2 + torch.tensor(bits).diff()
    assert float(gained) > 0.06  # bits a weight at the same error


def test_columns_absorb_the_errors_of_those_before() -> None:
    draws = torch.Generator().manual_seed(2)
    z = torch.randn(400, 90, generator=draws) @ torch.randn(90, 90, generator=draws)
    w, h = laplace(1, 16, 90), (z.T @ z / 400)[None]
    blind, seeing = (round_trellis(w, x, 0.5, slope=0.0) for x in (torch.eye(90)[None], h))
    errors = [float((((0.5 * v - w) @ h) * (0.5 * v - w)).sum()) for v in (blind, seeing)]
    assert errors[1] < 0.5 * errors[0]


def test_groups_and_parts_of_rows_are_rounded_as_if_alone(monkeypatch) -> None:
    draws = torch.Generator().manual_seed(3)
    z = torch.randn(3, 100, 40, generator=draws)
    w, h = laplace(3, 6, 40), z.mT @ z / 100
    together = round_trellis(w, h, 0.4, slope=0.0)
    for g in range(3):
        assert torch.equal(together[g : g + 1], round_trellis(w[g : g + 1], h[g : g + 1], 0.4, slope=0.0))
    monkeypatch.setattr("lightning_caq.quantizers.rounding.trellis._LANES", 8 * 3 * 40 * 2)
    assert torch.equal(together, round_trellis(w, h, 0.4, slope=0.0))
