"""Long-axis rounding against every pattern there is, and against dense matrices."""

import itertools

import numpy as np
import pytest
import torch
from every import every

from lightning_caq.quantizers.grids.affine import Grid, fit_grid
from lightning_caq.quantizers.rounding import long_axis
from lightning_caq.quantizers.rounding.long_axis import exchanges, round_long_axis
from lightning_caq.quantizers.rounding.quadratic_model import QuadraticModel


def _made(n, k, seed, *, signed=False, residual=1e-3):
    draws = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(n, k, generator=draws))[0]
    values = torch.logspace(0, -1, k, dtype=torch.float64)
    gradient = torch.zeros(n)
    if signed:
        values[1::2] *= -1
        gradient = 0.02 * torch.randn(n, generator=draws)
    errors = torch.rand(n, generator=draws, dtype=torch.float64) - 0.5
    steps = -errors.sign()
    steps[0] = 0  # a weight outside the grid
    return QuadraticModel((n,), values, vectors, residual, gradient), errors, steps


def _dense(model, deltas):
    """The quadratic form written out, of one Δ or of many."""
    v = model.vectors.double().numpy()
    h = v * model.values.numpy() @ v.T + model.residual * np.eye(len(v))
    return deltas @ model.gradient.double().numpy() + 0.5 * (deltas @ h * deltas).sum(-1)


# Negative curvature falls off on two sides, and descent ends on one of them.
@every(("signed", "allowed"), [(False, 0.05), (True, 0.35)])
def test_near_the_best_of_all_patterns_and_never_better(signed, allowed):
    n, lost = 14, []
    patterns = np.array(list(itertools.product([0, 1], repeat=n)))
    for seed in range(20):
        model, errors, steps = _made(n, 2, seed, signed=signed)
        best = _dense(model, errors.numpy() + patterns * steps.numpy()).min()
        found = _dense(model, (errors + exchanges(errors, steps, model) * steps).numpy())
        nearest = _dense(model, errors.numpy())
        assert best - 1e-12 <= found <= nearest
        lost.append((found - best) / (nearest - best))
    assert np.median(lost) < allowed  # of what could be gained


@pytest.mark.parametrize("signed", [False, True])
def test_no_single_exchange_is_left_that_helps(signed, monkeypatch):
    monkeypatch.setattr(long_axis, "_BLOCK", 32)  # the last block is a part
    model, errors, steps = _made(300, 8, 1, signed=signed)
    moved = exchanges(errors, steps, model)
    assert not moved[0]  # it has no other value
    delta = errors + moved * steps
    least = _dense(model, delta.numpy())
    for i in range(300):
        other = delta.clone()
        other[i] += steps[i] * (-1 if moved[i] else 1)
        assert _dense(model, other.numpy()) >= least - 1e-10


def test_energy_along_few_directions_is_almost_nothing():
    model, errors, steps = _made(4000, 16, 2, residual=1e-6)
    delta = errors + exchanges(errors, steps, model) * steps
    assert model.steep_energy(delta) < 1e-3 * model.steep_energy(errors)
    assert float(delta.square().sum()) < 1.1 * float(errors.square().sum())


def test_the_price_of_large_errors_keeps_the_nearest_values():
    model, errors, steps = _made(50, 2, 3)
    assert exchanges(errors, steps, model).any()
    assert not exchanges(errors, steps, model.stiffened(1e9)).any()


@every("widths", [3, (2, 4, 3)])
def test_codes_are_one_of_two_neighbours_on_every_grid(widths):
    weights = [torch.randn(3, 40), torch.randn(5, 24)]
    grids = [fit_grid(weights[0], widths, (3, 1)), Grid(2, torch.full((1, 1), 0.5), torch.ones(1, 1))]
    weights[1][0, :4] = torch.tensor([-9.0, 9.0, 0.5, 0.0])  # outside the grid, and on it
    vectors = torch.linalg.qr(torch.randn(240, 12))[0]
    model = QuadraticModel((120, 120), torch.ones(12, dtype=torch.float64), vectors, 1e-4, torch.zeros(240))
    codes = round_long_axis(weights, grids, model)
    moved = 0
    for w, grid, c in zip(weights, grids, codes, strict=True):
        assert c.dtype == torch.uint8
        assert c.shape == w.shape
        assert bool((c <= grid.top).all())
        place = w / grid.scale + grid.zero_point
        inside = (place >= 0) & (place <= grid.top)
        assert bool(((c - place).abs() < 1)[inside].all())
        assert torch.equal(c[~inside].float(), grid.codes(w)[~inside])
        moved += int((c != grid.codes(w)).sum())
    assert moved > 0
    assert codes[1][0, :4].tolist() == [0, 3, 2, 1]
