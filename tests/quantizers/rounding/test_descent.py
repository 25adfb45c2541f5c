"""Descent against brute force, least squares by numpy, and its own promise never to make things worse."""

import itertools
from dataclasses import replace

import nets
import numpy as np
import pytest
import rounding_help
import torch
from every import every
from torch import nn

from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.quantizers.grids.affine import Grid, fit_grid
from lightning_caq.quantizers.rounding import descent as module_under_test
from lightning_caq.quantizers.rounding.descent import improve, output_error
from lightning_caq.quantizers.rounding.moments import damped
from lightning_caq.quantizers.rounding.round_layer import round_error_feedback, round_nearest

LAYERS = {
    "linear": lambda: (nn.Linear(30, 8), (30,)),
    **{k: nets.CONVOLUTIONS[k] for k in ("stride_padding", "groups", "depthwise", "conv3d")},
    **{k: nets.CONVOLUTIONS[k] for k in ("transposed", "transposed_all")},
}


def _layer(name):
    made = LAYERS[name]
    module, shape = made() if callable(made) else (made[0](), made[1])
    draws = torch.Generator().manual_seed(0)
    size = int(torch.Size(shape).numel())
    x = (torch.randn(50, size, generator=draws) @ torch.randn(size, size, generator=draws) / size**0.5 + 0.5).reshape(
        50, *shape
    )
    net = nn.Sequential(module)
    (layer,) = find_layers(net, x)
    return layer, module.weight.detach(), rounding_help.moments(net, layer, [x], {}).curvature


@every("bits", [1, 2, 4])
@every("name", LAYERS)
def test_never_makes_a_layer_worse(name, bits):
    layer, w, h = _layer(name)
    grid = fit_grid(w, bits, layer.channel_shape)
    for codes in (round_nearest(w, grid), round_error_feedback(layer, w, grid, h)):
        better, found = improve(layer, w, grid, codes, h)
        before = output_error(layer, w, grid.values(codes), damped(h))
        after = output_error(layer, w, better.values(found), damped(h))
        if layer.transposed:  # its groups share scales
            before, after = before.sum(0), after.sum(0)
        assert bool((after <= before * (1 + 1e-5) + 1e-12).all())
        assert int(found.max()) <= 2**bits - 1
        assert found.dtype == torch.uint8
        assert found.shape == w.shape
        assert better.scale.shape == grid.scale.shape
        assert torch.equal(better.zero_point, grid.zero_point)
    assert float(after.sum()) < float(output_error(layer, w, grid.nearest(w), damped(h)).sum())


def _column_by_column(w, c, s, z, top, h):
    """A sweep as it is defined, each column looked at alone."""
    slope = h @ (s * (c - z) - w)
    for j in range(w.shape[1]):
        best = (c[:, j] - slope[:, j] / (h[:, j, j, None] * s[:, j])).round().clamp(min=0).minimum(top)
        slope += h[:, :, j, None] * ((best - c[:, j]) * s[:, j])[:, None]
        c[:, j] = best


@every("start", ["nearest", "far"])
def test_a_sweep_over_blocks_is_one_column_by_column(start):
    """Most columns stay after rounding to nearest, none does where all codes begin at 0."""
    a, w = torch.randn(2, 29, 40).double(), torch.randn(2, 29, 5).double()
    s = torch.tensor([0.3] * 16 + [0.4] * 13).double()[None, :, None].expand(2, 29, 5)  # two groups of columns
    h, z, top = a @ a.mT / 40, torch.full((2, 29, 5), 3.0), torch.full((2, 5), 7.0)
    c = (w / s + 3).round().clamp(0, 7) if start == "nearest" else torch.zeros_like(w)
    expected = c.clone()
    _column_by_column(w, expected, s, z, top, h)
    before = c.clone()
    assert module_under_test._sweep(w, c, s, z, top, h) == (not torch.equal(expected, before))
    assert torch.equal(c, expected)
    assert not module_under_test._sweep(s * (c - z), c, s, z, top, h)  # no error is left to lower


def test_no_single_code_is_left_to_improve(monkeypatch):
    monkeypatch.setattr(module_under_test, "_SWEEPS", 100)
    monkeypatch.setattr(module_under_test, "_ROUNDS", 1)
    layer, w, h = _layer("linear")
    grid = fit_grid(w, 2, layer.channel_shape)
    _, codes = improve(layer, w, grid, round_nearest(w, grid), h)
    least = output_error(layer, w, grid.values(codes), damped(h))[0]
    for j, value in itertools.product(range(30), range(4)):
        other = codes.clone()
        other[:, j] = value
        assert bool((output_error(layer, w, grid.values(other), damped(h))[0] >= least * (1 - 1e-5)).all())


def test_near_the_best_of_all_roundings():
    layer, ratios = Layer("fc", "linear", (1, 6)), []
    draws = torch.Generator().manual_seed(0)
    choices = torch.tensor(list(itertools.product(range(4), repeat=6)))
    for _ in range(30):
        z = torch.randn(40, 6, generator=draws) @ torch.randn(6, 6, generator=draws)
        h, w = (z.T @ z / 40)[None], torch.randn(1, 6, generator=draws)
        grid = fit_grid(w, 2, (1, 1))
        e = (grid.values(choices) - w).double()
        best = float(((e @ damped(h)[0]) * e).sum(1).min())
        better, codes = improve(layer, w, grid, round_error_feedback(layer, w, grid, h), h)
        ratios.append(float(output_error(layer, w, better.values(codes), damped(h))) / best)
    # The best of all 4,096 has the scale that was given: with a scale of its own descent may come out below it.
    assert np.median(ratios) < 1.1
    assert max(ratios) < 5


def test_scale_is_the_least_squares_one(monkeypatch):
    monkeypatch.setattr(module_under_test, "_SWEEPS", 0)
    layer, w, h = _layer("linear")
    grid = fit_grid(w, 3, layer.channel_shape)
    codes = round_nearest(w, grid)
    better, _ = improve(layer, w, grid, codes, h)
    root = np.linalg.cholesky(damped(h)[0].numpy()).T
    for row in range(len(w)):
        u = (codes[row].double() - grid.zero_point[row].double()).numpy()
        expected = np.linalg.lstsq((root @ u)[:, None], root @ w[row].double().numpy(), rcond=None)[0][0]
        assert float(better.scale[row]) == pytest.approx(expected, rel=1e-5)


def test_a_channel_without_a_better_scale_keeps_its_own():
    layer, grid = Layer("fc", "linear", (2, 3)), Grid(2, torch.full((2, 1), 0.5), torch.ones(2, 1))
    better, codes = improve(layer, torch.zeros(2, 3), grid, torch.ones(2, 3), torch.eye(3)[None])
    assert torch.equal(better.scale, grid.scale)
    assert torch.equal(codes, torch.ones(2, 3, dtype=torch.uint8))


@every("bits", [2, 4])
@every("size", [16, 32])
def test_scales_of_groups_solve_the_same_least_squares_as_numpy(size, bits):
    """With the codes that were found, going through the groups again and again ends at the joint solution."""
    draws = torch.Generator().manual_seed(bits)
    layer, w = Layer("fc", "linear", (4, 50)), torch.randn(4, 50, generator=draws)
    a = torch.randn(50, 80, generator=draws)
    h = (a @ a.T / 80)[None]
    grid = fit_grid(w, bits, (4, 1), group_size=size)
    before = output_error(layer, w, grid.nearest(w), damped(h))
    better, codes = improve(layer, w, grid, round_nearest(w, grid), h)
    assert bool((output_error(layer, w, better.values(codes), damped(h)) <= before).all())
    for _ in range(200):
        u, s = (codes - better.per_weight(w.shape)[1]).T[None], better.per_weight(w.shape)[0].T[None]
        scale = module_under_test._fit_scales(layer, w.T[None], u, damped(h).float(), s, better)
        better = replace(better, scale=scale)
    root = np.linalg.cholesky(damped(h)[0].numpy()).T  # the error is ‖root e‖²
    for row, (row_codes, zero) in enumerate(zip(codes, better.per_weight(w.shape)[1], strict=True)):
        u = (row_codes - zero).double().numpy()
        groups = np.arange(50) // size
        columns = np.stack([root @ (u * (groups == g)) for g in range(groups.max() + 1)], 1)
        best, *_ = np.linalg.lstsq(columns, root @ w[row].double().numpy(), rcond=None)
        assert np.allclose(better.scale[row, 0].numpy(), best, rtol=2e-3, atol=1e-4)


def test_short_scales_are_the_best_numbers_of_their_type():
    layer, w = Layer("fc", "linear", (3, 40)), torch.randn(3, 40)
    grid = fit_grid(w, 3, (3, 1), group_size=32, scale_dtype=torch.bfloat16)
    better, codes = improve(layer, w, grid, round_nearest(w, grid), torch.eye(40)[None])
    assert better.scale.dtype == torch.bfloat16
    least = (better.values(codes) - w).square()
    for factor in (1 - 2**-8, 1 + 2**-8):
        other = replace(better, scale=(better.scale.float() * factor).to(torch.bfloat16))
        assert not torch.equal(other.scale, better.scale)
        errors = (other.values(codes) - w).square()
        for part in (slice(0, 32), slice(32, 40)):
            assert bool((errors[:, part].sum(1) >= least[:, part].sum(1)).all())
