"""Errors of nearest rounding, and ranges of weights, against networks that are rounded by hand."""

import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.measure import measure
from lightning_caq.measures.rounding.rounding_errors import nearest_errors, weight_range
from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.quantizers.grids.values import Quantizer


def test_nearest_errors_are_within_half_a_step_of_the_grid_or_clipped():
    net = nn.Linear(30, 4)
    layer = find_layers(net, torch.randn(2, 30))[0]
    for bits, error in nearest_errors(net, layer, (2, 4, 8)).items():
        rounded = net.weight.detach() + error
        for row, source in zip(rounded, net.weight.detach(), strict=True):
            values = row[(row[:, None] - row).abs().lt(1e-6).int().argmax(dim=1)].unique()  # but for float noise
            assert len(values) <= 2**bits
            # Every weight went to the nearest of the values in use.
            nearest = values[(source[:, None] - values).abs().argmin(dim=1)]
            torch.testing.assert_close(row, nearest, rtol=0, atol=1e-6)


@every(("kind", "axis"), [("conv2d", 0), ("conv_transpose2d", 1)])
def test_range_is_by_output_channel(kind, axis):
    net = nn.Conv2d(2, 3, 2) if axis == 0 else nn.ConvTranspose2d(2, 3, 2)
    weight = net.weight.detach().numpy()
    others = tuple(d for d in range(4) if d != axis)
    expected = ((weight.max(others) - weight.min(others)) ** 2).mean() ** 0.5
    assert weight_range(net, Layer("", kind, tuple(weight.shape))) == pytest.approx(float(expected), rel=1e-6)


def test_errors_are_those_of_the_quantizer_that_is_named():
    """Symmetric grids over the whole range by hand, and a profile that says what its figures are of."""
    net, x = nn.Linear(30, 4, bias=False), torch.randn(5, 30)
    weight = net.weight.detach()
    # 2 bits: −2, …, 1 times a step with which both ends of the range are reached.
    step = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True) / 2)
    expected = step * (weight / step).round().clamp(-2, 1) - weight
    quantizer = Quantizer(range="minmax", symmetry="symmetric")
    torch.testing.assert_close(nearest_errors(net, find_layers(net, x)[0], (2,), quantizer)[2], expected)
    needs = frozenset({"rounding_error"})
    profile = measure(net, [x], needs=needs, bits=(2,), quantizer=quantizer)
    assert profile.layers[0].rounding_error[2] == pytest.approx(float(expected.square().sum()), rel=1e-5)
    assert (profile.quantizer, profile.range, profile.symmetry) == ("affine", "minmax", "symmetric")
    default = measure(net, [x], needs=needs, bits=(2,), known=profile)  # known of other grids, so measured anew
    assert default.layers[0].rounding_error[2] < profile.layers[0].rounding_error[2]


def test_errors_stay_those_of_the_weights_they_were_made_of():
    net = nn.Linear(30, 4)
    layer = find_layers(net, torch.randn(2, 30))[0]
    before = net.weight.detach().clone()
    errors = nearest_errors(net, layer, (2, 8))
    with torch.no_grad():
        net.weight.zero_()
    for bits in errors:
        expected = Quantizer().fit(before, bits, (4, 1)).nearest(before) - before
        torch.testing.assert_close(errors[bits], expected)
