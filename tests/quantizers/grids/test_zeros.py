"""Zeros of pruned weights stay zero."""

import nets
import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import OptionError
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.grids.zeros import kept_zeros, with_zero

FAST = {"compare": (), "guard": False, "curvature_samples": 32, "eigenpairs": 4}


def _pruned(weight, share):
    threshold = weight.abs().flatten().kthvalue(max(int(share * weight.numel()), 1)).values
    return weight.masked_fill(weight.abs() <= threshold, 0.0)


def _network(share):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        for module in (net[0], net[2], net[6]):
            module.weight.copy_(_pruned(module.weight, share))
    return net.eval()


def test_when_zeros_are_kept():
    few, many = torch.tensor([0.0, *[1.0] * 9]), torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0])
    assert [kept_zeros(few, keep) is not None for keep in (None, True, False)] == [False, True, False]
    assert [kept_zeros(many, keep) is not None for keep in (None, True, False)] == [True, True, False]
    assert kept_zeros(torch.ones(3), True) is None


def test_a_grid_with_zero_is_the_best_of_all_whole_zero_points():
    for seed in range(4):
        torch.manual_seed(seed)
        weight = _pruned(torch.randn(5, 60) + torch.randn(5, 1), 0.4)
        for bits in (2, 3, 4):
            grid = with_zero(fit_grid(weight, bits, (5, 1)), weight, weight == 0)
            rounded = grid.nearest(weight)
            assert (rounded[weight == 0] == 0).all()
            error = (rounded - weight).square().sum(1)
            scales = torch.linspace(0.02, 2.5, 400)
            for row in range(5):
                best = min(
                    float(((w / s + z).round().clamp(0, 2**bits - 1) - z).mul(s).sub(w).square().sum())
                    for s in scales
                    for z in range(2**bits)
                    for w in [weight[row]]
                )
                assert float(error[row]) < 1.35 * best + 1e-6


def test_channels_without_zeros_keep_their_grid():
    weight = torch.randn(2, 40)
    weight[1] = _pruned(weight[1], 0.5)
    grid = fit_grid(weight, 2, (2, 1), symmetry="mid_rise")
    found = with_zero(grid, weight, weight == 0)
    assert torch.equal(found.zero_point[0], grid.zero_point[0])
    assert torch.equal(found.scale[0], grid.scale[0])
    assert float(found.zero_point[1]) % 1 == 0


def test_zeros_survive_every_rounding():
    x = nets.images(64, 0)[0].repeat(1, 3, 1, 1)
    for options in (
        {"rounding": "nearest"},
        {"rounding": "error_feedback"},
        {"rounding": "long_axis"},
        {"rounding": "error_feedback", "symmetry": "mid_rise"},
        {"rounding": "error_feedback", "granularity": "channel_group"},
        {"rounding": "error_feedback", "quantizer": "codebook"},
    ):
        net = _network(0.5)
        before = {name: p.detach() == 0 for name, p in net.named_parameters() if p.ndim > 1}
        quantize(net, [x], avg_bits=3, **options, **FAST)
        for name, zeros in before.items():
            assert (net.get_parameter(name)[zeros] == 0).all(), (options, name)
            assert (net.get_parameter(name)[~zeros] != 0).any()


def test_zeros_are_let_go_where_that_is_asked():
    x = nets.images(64, 0)[0].repeat(1, 3, 1, 1)
    for share, keep, kept in ((0.5, False, False), (0.1, None, False), (0.1, True, True)):
        net = _network(share)
        zeros = {name: p.detach() == 0 for name, p in net.named_parameters() if p.ndim > 1}
        quantize(net, [x], avg_bits=3, keep_zeros=keep, **FAST)
        assert all((net.get_parameter(name)[z] == 0).all() for name, z in zeros.items()) == kept


def test_quantizers_without_zero_refuse():
    with pytest.raises(OptionError, match="keep_zeros=True is for quantizer='affine' or 'codebook'"):
        quantize(nn.Linear(4, 4), [torch.randn(8, 4)], avg_bits=3, quantizer="lq_nets", keep_zeros=True)
    with pytest.raises(OptionError, match="keep_zeros='yes' is not allowed"):
        quantize(nn.Linear(4, 4), [torch.randn(8, 4)], avg_bits=3, keep_zeros="yes")
