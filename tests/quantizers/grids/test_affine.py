"""Grids against a plain numpy quantizer and against an exhaustive search of scales and zero points."""

import nets
import numpy as np
import pytest
import torch
from channel_layers import CHANNEL_LAYERS, WIDTHS, channel, one_layer
from every import every
from torch import nn

from lightning_caq.network.layers import layer_weight, quantizable_layers
from lightning_caq.quantizers.fake_quant.modules import on_grid
from lightning_caq.quantizers.grids.affine import Grid, fit_grid

DRAWS = {
    "normal": lambda r, n: r.normal(size=n),
    "uniform": lambda r, n: r.uniform(-1, 1, size=n),
    "laplace": lambda r, n: r.laplace(size=n),
    "positive": lambda r, n: r.exponential(size=n),
    "shifted": lambda r, n: 3 + 0.5 * r.normal(size=n),
    "two_heaps": lambda r, n: r.normal(size=n) * 0.2 + r.choice([-1.0, 2.0], size=n),
    "outlier": lambda r, n: np.append(r.normal(size=n - 1), 12.0),
    "few": lambda r, n: r.normal(size=5),
    "tiny": lambda r, n: 1e-8 * r.normal(size=n),
}


def _numpy_codes(w, scale, zero, bits):
    return np.clip(np.rint(w / scale + zero), 0, 2**bits - 1)


def _exhaustive(w, bits):
    """The least squared error over a dense range of scales and every half-integer zero point that makes sense."""
    top, best = 2**bits - 1, np.inf
    span = w.max() - w.min()
    for scale in np.geomspace(0.15 * span / top, 1.3 * span / max(top, 1), 200):
        first, last = np.floor(-2 * w.max() / scale), np.ceil(2 * (top - w.min() / scale))
        zeros = np.arange(first, last + 1)[:, None] / 2
        error = np.square(scale * (np.clip(np.rint(w / scale + zeros), 0, top) - zeros) - w).sum(1)
        best = min(best, error.min())
    return best


def _error(w, grid):
    return float((grid.nearest(w).double() - w.double()).square().sum())


@every("bits", [1, 2, 3, 4])
@every("draw", sorted(DRAWS.keys() - {"few"}))  # five weights on 16 values err by next to nothing
def test_is_close_to_the_best_grid(draw, bits):
    rng = np.random.default_rng(bits)
    ratios = []
    for _ in range(6):
        w = torch.tensor(DRAWS[draw](rng, 48), dtype=torch.float32)
        ratios.append(
            _error(w[None], fit_grid(w[None], bits, (1, 1))) / (_exhaustive(w.double().numpy(), bits) + 1e-30)
        )
    assert np.mean(ratios) < 1.06
    assert max(ratios) < 1.2


@every("bits", [2, 3, 4])
@every("draw", ["tails on both sides", "a tail on one side"])
def test_heavy_tails_are_cut_off_where_it_pays(draw, bits):
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, size=4608) if draw == "tails on both sides" else rng.gamma(1.5, size=4608) - 0.7
    top, span = 2**bits - 1, w.max() - w.min()
    zeros = np.arange(2 * top + 1)[:, None] / 2
    best = min(
        np.square(scale * (np.clip(np.rint(w / scale + zeros), 0, top) - zeros) - w).sum(1).min()
        for scale in np.geomspace(0.03, 1, 150) * span / top
    )
    weight = torch.tensor(w, dtype=torch.float32)[None]
    assert _error(weight, fit_grid(weight, bits, (1, 1))) < 1.1 * best


@every("bits", [1, 2, 3, 5, 8])
@every("draw", DRAWS)
def test_is_never_worse_than_the_full_range(draw, bits):
    rng = np.random.default_rng(0)
    w = torch.tensor(np.stack([DRAWS[draw](rng, 64) for _ in range(8)]), dtype=torch.float32)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    full = Grid(bits, scale, (-2 * low / scale).round() / 2)
    found = fit_grid(w, bits, (8, 1))
    assert bool(
        ((found.nearest(w) - w).square().sum(1) <= (full.nearest(w) - w).square().sum(1) * (1 + 1e-4) + 1e-30).all()
    )


@every("name", nets.CONVOLUTIONS)
@every("bits", [2, 8])
def test_codes_against_a_numpy_loop_channel_by_channel(name, bits):
    module = nets.CONVOLUTIONS[name][0]()
    (layer,) = quantizable_layers(nn.Sequential(module))
    weight = module.weight.detach()
    grid = fit_grid(weight, bits, layer.channel_shape)
    assert grid.scale.shape == grid.zero_point.shape == layer.channel_shape
    assert grid.scale.dtype == grid.zero_point.dtype == torch.float32
    axis = 1 if "transposed" in name else 0
    for index in range(weight.shape[axis]):
        w = weight.select(axis, index).numpy()
        scale = grid.scale.flatten()[index].numpy()
        zero = grid.zero_point.flatten()[index].numpy()
        assert scale > 0
        assert float(2 * zero).is_integer()
        codes = _numpy_codes(w, scale, zero, bits)
        np.testing.assert_array_equal(grid.codes(weight).select(axis, index).numpy(), codes)
        np.testing.assert_array_equal(grid.nearest(weight).select(axis, index).numpy(), scale * (codes - zero))


def test_channels_do_not_see_each_other():
    w = torch.randn(5, 30) * torch.tensor([[1e-6], [1.0], [1e5], [3.0], [0.1]])
    together = fit_grid(w, 3, (5, 1))
    for i in range(5):
        alone = fit_grid(w[i : i + 1], 3, (1, 1))
        assert torch.equal(together.scale[i], alone.scale[0])
        assert torch.equal(together.zero_point[i], alone.zero_point[0])


@every("bits", [1, 2, 8])
@every("value", [0.0, 1.0, -2.5, 1e-20, -3e7, 0.1])
def test_a_constant_channel_is_stored_exactly(value, bits):
    w = torch.full((2, 6), value)
    w[1] = torch.randn(6)
    grid = fit_grid(w, bits, (2, 1))
    assert torch.equal(grid.nearest(w)[0], w[0])
    assert bool(torch.isfinite(grid.scale).all())


def test_values_on_a_grid_are_found_again():
    codes = torch.randint(0, 8, (4, 50)).float()
    codes[:, :2] = torch.tensor([0.0, 7.0])
    w = Grid(3, torch.tensor([[0.5], [0.1], [2.0], [1e-3]]), torch.tensor([[3.0], [0.0], [3.5], [7.0]])).values(codes)
    torch.testing.assert_close(fit_grid(w, 3, (4, 1)).nearest(w), w, rtol=1e-6, atol=1e-9)


@every("offset", [1.0, -40.0, 1e4])
@every("bits", [2, 8])
def test_a_narrow_range_far_from_zero(offset, bits):
    """The zero point has 16 bits: the step widens until it reaches, and no weight is lost."""
    w = offset * (1 + 1e-4 * torch.rand(3, 40))
    grid = fit_grid(w, bits, (3, 1))
    assert float(grid.zero_point.abs().max()) <= 2**15
    assert float((grid.nearest(w) - w).abs().max()) < 1e-4 * abs(offset)


def test_zero_points_fit_their_16_bits():
    w = torch.randn(200, 20) + 10.0 ** torch.linspace(-3, 6, 200)[:, None]
    for bits in (2, 8):
        zero = fit_grid(w, bits, (200, 1)).zero_point
        assert float((2 * zero).abs().max()) < 2**15


@every("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_give_a_float32_grid(dtype):
    w = torch.randn(3, 20).to(dtype)
    grid = fit_grid(w, 4, (3, 1))
    assert torch.equal(grid.scale, fit_grid(w.float(), 4, (3, 1)).scale)
    assert grid.nearest(w).dtype == torch.float32


def test_half_steps_round_a_symmetric_channel_better_at_two_bits():
    w = torch.linspace(-1, 1, 101)[None]
    grid = fit_grid(w, 2, (1, 1))
    assert float(grid.zero_point) == 1.5
    assert float(grid.scale) == pytest.approx(0.5, rel=0.02)


def test_does_not_touch_the_weight_or_its_graph():
    w = torch.randn(3, 20, requires_grad=True)
    before = w.detach().clone()
    grid = fit_grid(w, 3, (3, 1))
    assert not grid.scale.requires_grad
    assert torch.equal(w.detach(), before)


@every("name", CHANNEL_LAYERS)
def test_each_channel_gets_the_grid_that_it_would_get_alone(name):
    net, layer, _ = one_layer(name)
    weight = layer_weight(net, layer).detach()
    grid = fit_grid(weight, WIDTHS, layer.channel_shape)
    assert (grid.bits, grid.width) == (8, WIDTHS)
    rounded, codes = grid.nearest(weight), grid.codes(weight)
    for c, b in enumerate(WIDTHS):
        alone = fit_grid(weight, b, layer.channel_shape).nearest(weight)
        assert torch.equal(channel(layer, rounded, c), channel(layer, alone, c))
        assert int(channel(layer, codes, c).max()) <= 2**b - 1
    assert on_grid(rounded, grid)
    assert not on_grid(weight, grid)


def test_to_another_device_and_back():
    grid = Grid(4, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([[2], [4]], dtype=torch.uint8))
    moved = grid.to("meta").channel_bits
    assert moved is not None
    assert moved.device.type == "meta"
    assert grid.to("cpu").width == (2, 4)


def test_grids_of_long_channels_are_near_the_best_of_a_dense_search():
    """Channels of 2,000 weights, whose ranges are not all looked at, against many more steps and zero points."""
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(2, 2000, generator=generator) * torch.tensor([[0.1], [1.0]])
    w[1] = w[1] ** 3  # heavy tails
    for bits in (2, 3, 4, 6, 8):
        grid = fit_grid(w, bits, (2, 1))
        error = (grid.nearest(w) - w).square().sum(1)
        top = 2**bits - 1
        for index, row in enumerate(w.numpy().astype(float)):
            best = np.inf
            for fraction in np.linspace(0.1, 1.05, 120):
                step = fraction * (row.max() - row.min()) / top
                for zero in np.round(2 * (top / 2 - row.mean() / step)) / 2 + np.arange(-3, 3.5, 0.5):
                    codes = np.clip(np.round(row / step + zero), 0, top)
                    best = min(best, ((step * (codes - zero) - row) ** 2).sum())
            assert float(error[index]) <= 1.03 * best, (bits, index)
