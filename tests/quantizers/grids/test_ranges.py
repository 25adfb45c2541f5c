"""Ranges of affine grids against numpy and brute force."""

import itertools

import numpy as np
import torch
from every import every

from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.grids.ranges import RANGES, SIGNED_BYTE, SYMMETRIES


def _draw(rows=4, columns=500, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def _error(grid, w, importance=1.0):
    return float((importance * (grid.nearest(w) - w).double().square()).sum())


def test_minmax_and_percentile_end_where_numpy_says():
    w = _draw(columns=2000)
    codes = torch.tensor([0.0, 255.0]).expand(4, 2)
    step = float((w.amax(1) - w.amin(1)).max()) / 255
    ends = fit_grid(w, 8, (4, 1), range="minmax").values(codes)
    expected = np.stack([w.amin(1), w.amax(1)], 1)
    np.testing.assert_allclose(ends, expected, atol=0.26 * step)  # zero points are multiples of one half
    ends = fit_grid(w, 8, (4, 1), range="percentile").values(codes)
    np.testing.assert_allclose(ends, np.percentile(w.double(), [0.1, 99.9], axis=1).T, atol=0.26 * step)


@every("range_", RANGES)
@every("bits", [1, 2, 3, 4, 8])
def test_symmetry_fixes_the_zero_point(range_, bits):
    w = _draw() + 0.05
    for symmetry, zero in (("symmetric", 2 ** (bits - 1)), ("mid_rise", (2**bits - 1) / 2)):
        grid = fit_grid(w, bits, (4, 1), range=range_, symmetry=symmetry)
        assert bool((grid.zero_point == zero).all())
        assert bool((grid.scale > 0).all())
    if bits > 1:
        grid = fit_grid(w, bits, (4, 1), range="minmax", symmetry="symmetric")
        assert bool(((grid.nearest(w) - w).abs() <= grid.scale * 0.501).all())  # no weight is cut off


@every("bits", [2, 3])
@every("symmetry", SYMMETRIES)
def test_mse_is_near_the_best_of_a_fine_search(bits, symmetry):
    w = _draw(rows=1, columns=300, seed=3)
    found = _error(fit_grid(w, bits, (1, 1), range="mse", symmetry=symmetry), w)
    zeros = np.arange(0, 2**bits, 0.5)
    if symmetry != "asymmetric":
        zeros = [2 ** (bits - 1) if symmetry == "symmetric" else (2**bits - 1) / 2]
    x = w.double().numpy()
    best = min(
        np.square(s * (np.clip(np.round(x / s + z), 0, 2**bits - 1) - z) - x).sum()
        for s, z in itertools.product(np.linspace(0.005, 0.3, 600), zeros)
    )
    assert found <= 1.02 * best


def test_curvature_lowers_the_weighted_error():
    w = _draw(rows=6)
    importance = torch.rand(500, generator=torch.Generator().manual_seed(1)).pow(8).expand(6, 500)
    for bits, symmetry in itertools.product((2, 3, 4), SYMMETRIES):
        weighted = fit_grid(w, bits, (6, 1), range="curvature", symmetry=symmetry, importance=importance)
        plain = fit_grid(w, bits, (6, 1), range="mse", symmetry=symmetry)
        assert _error(weighted, w, importance) < _error(plain, w, importance)


def test_curvature_without_importance_is_no_worse_than_mse():
    w = _draw()
    assert _error(fit_grid(w, 2, (4, 1), range="curvature"), w) <= _error(fit_grid(w, 2, (4, 1)), w) * (1 + 1e-6)


@every("range_", RANGES)
@every("value", [0.0, 0.3, -2.0])
def test_constant_channels(range_, value):
    w = torch.full((2, 5), value)
    grid = fit_grid(w, 2, (2, 1), range=range_)
    assert bool((grid.scale.isfinite() & (grid.scale > 0)).all())
    torch.testing.assert_close(grid.nearest(w), w)


@every("range_", RANGES)
def test_each_channel_may_have_its_own_bits(range_):
    w = _draw(rows=3)
    mixed = fit_grid(w, (2, 4, 2), (3, 1), range=range_)
    assert mixed.width == (2, 4, 2)
    for row, bits in enumerate((2, 4, 2)):
        alone = fit_grid(w[row : row + 1], bits, (1, 1), range=range_)
        torch.testing.assert_close(mixed.nearest(w)[row], alone.nearest(w[row : row + 1])[0])


@every("range_", RANGES)
def test_channels_along_the_second_dimension(range_):
    w = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    grid = fit_grid(w, 3, (1, 4, 1, 1), range=range_)
    one = fit_grid(w[:, 2:3], 3, (1, 1, 1, 1), range=range_)
    assert grid.scale.shape == (1, 4, 1, 1)
    torch.testing.assert_close(grid.scale[:, 2:3], one.scale)


@every("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@every("range_", RANGES)
def test_signed_bytes_hold_codes_less_zero_point(bits, range_):
    for shift in (0.0, 0.05, 3.0, -3.0):  # around zero, beside it, and far from it on either side
        w = _draw() + shift
        grid = fit_grid(w, bits, (4, 1), range=range_, symmetry=SIGNED_BYTE)
        factor = 1 if bits in (4, 7, 8) else 2  # zero may lie between two codes where doubled codes fit as well
        whole = factor * torch.stack([-grid.zero_point, grid.top - grid.zero_point])
        assert bool((whole == whole.round()).all())
        assert -128 <= float(whole.min()) <= 0 <= float(whole.max()) <= 127
        if range_ == "minmax" and bits > 1:
            assert bool(((grid.nearest(w) - w).abs() <= 1.01 * grid.scale).all())


def test_signed_bytes_are_near_the_best_of_a_fine_search():
    w = _draw(rows=1, columns=300, seed=3) + 0.03
    x = w.double().numpy()
    best = min(
        np.square(s * (np.clip(np.round(x / s + z), 0, 15) - z) - x).sum()
        for s, z in itertools.product(np.linspace(0.01, 0.06, 600), range(16))
    )
    assert _error(fit_grid(w, 4, (1, 1), symmetry=SIGNED_BYTE), w) <= 1.05 * best
