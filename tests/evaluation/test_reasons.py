"""Reasons against costs that are counted by hand, and against the solver's own choice."""

import nets
import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.allocation.steps import sensitivities
from lightning_caq.evaluation.reasons import reasons
from lightning_caq.plan import LayerPlan, QuantizationPlan
from lightning_caq.profile import ChannelGroup, CurvatureProfile, LayerCurvature
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.sizes import LayerSizes

BITS = (2, 3, 4, 8)


def _plan(grid, method="cet"):
    layer = LayerPlan("fc", ("fc",), grid, torch.zeros(2, 500, dtype=torch.int32))
    return QuantizationPlan(method, "", "nearest", (layer,), LayerSizes((1000,), (2,)), "")


def _grid(bits):
    return Grid(bits, torch.ones(2, 1), torch.zeros(2, 1))


def _row(**values):
    known = {"subspace_energy": {2: 8.0, 3: 4.0, 4: 2.0, 8: 1.0}, "rounding_error": dict.fromkeys(BITS, 1.0)}
    return LayerCurvature("fc", 1000, 2, 1000, **(known | values))


def test_damage_is_the_methods_cost_at_the_widths_on_either_side():
    profile = CurvatureProfile((_row(outside=(2,), loss_change={2: 7.0}),), residual_curvature=2.0)
    (reason,) = reasons("cet", profile, BITS, _plan(_grid(3)))
    assert (reason.fewer, reason.bits, reason.more) == (2, 3, 4)
    assert (reason.damage_fewer, reason.damage, reason.damage_more) == (7.0, 3.0, 2.0)  # ½ (energy + μ ‖Δ‖²)
    assert reason.bought == pytest.approx(4.0 / 0.125)  # a bit of 1,000 weights is 0.125 kB
    assert reason.next == pytest.approx(1.0 / 0.125)
    assert (reason.source, reason.unit) == ("modelled", "nat")
    assert reasons("cet", profile, BITS, _plan(_grid(2)))[0].source == "measured"
    last = reasons("cet", profile, BITS, _plan(_grid(8)))[0]
    assert (last.more, last.next) == (None, None)
    assert last.bought == pytest.approx(0.5 / 0.5)  # four bits of 1,000 weights are 0.5 kB


def test_groups_of_channels_count_together():
    energy = {2: 8.0, 3: 4.0, 4: 2.0, 8: 1.0}
    groups = [
        LayerCurvature(
            f"fc/{i}",
            500,
            1,
            1,
            subspace_energy={b: (i + 1) * x for b, x in energy.items()},
            rounding_error=dict.fromkeys(BITS, 0.0),
            outside=(3,) if i else (),
            loss_change={3: 9.0},
        )
        for i in range(2)
    ]
    row = _row(groups=tuple(ChannelGroup((i,), group) for i, group in enumerate(groups)))
    (reason,) = reasons("cet", CurvatureProfile((row,)), BITS, _plan(_grid((4, 3))))
    assert (reason.fewer, reason.bits, reason.more) == (2.5, 3.5, 6.0)
    assert reason.damage == pytest.approx(0.5 * 2.0 + 9.0)
    assert reason.damage_fewer == pytest.approx(9.0 - 9.0 + 0.5 * 4.0 + 0.5 * 16.0)
    assert reason.source == "partly measured"


def test_a_step_has_four_times_the_damage_a_bit_earlier():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    result = quantize(net, [torch.randn(64, 32)], avg_bits=3, coding="entropy", guard=False, compare=())
    for reason, layer in zip(result.report.reasons, result.plan.layers, strict=True):
        slope = sensitivities("cet", result.profile, (2, 3, 4, 5, 6, 8))[list(result.plan.bits).index(layer.name)]
        assert reason.damage == pytest.approx(slope * layer.distortion * layer.codes.numel())
        assert reason.damage_fewer / reason.damage == reason.damage / reason.damage_more == 4
        assert (reason.fewer, reason.more) == (reason.bits - 1, reason.bits + 1)


def test_searches_and_uniform_bits_claim_no_damage():
    profile = CurvatureProfile((_row(),))
    for method, source in (("uniform", "uniform"), ("random_search", "searched")):
        (reason,) = reasons(method, profile, BITS, _plan(_grid(3), method))
        assert (reason.damage, reason.bought, reason.source) == (None, None, source)


def test_no_further_step_within_the_budget_would_have_bought_more():
    """What the solver did: with fine steps, the last ones bought no less than further ones would that fit."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 4))
    nets.trained(net, torch.randn(128, 16), torch.randint(4, (128,)), steps=40).eval()
    result = quantize(net, [torch.randn(128, 16)], avg_bits=4, bits=tuple(range(1, 9)), guard=False, compare=())
    known = result.report.reasons
    assert [reason.name for reason in known] == list(result.plan.bits)
    equal = [reason for reason in known if reason.weights == 256]
    # Layers of one size trade bits one for one: moving one from a layer to another never helps.
    assert min(reason.bought for reason in equal) >= max(reason.next for reason in equal) - 1e-9
