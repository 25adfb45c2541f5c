"""Padded positions tell nothing: statistics of layers are those of the positions that count."""

import pytest
import torch
from torch import nn

from lightning_caq.measures.measure import measure
from lightning_caq.network.hooks import visit_modules
from lightning_caq.network.layers import find_layers
from lightning_caq.network.prepare import ModelUse, prepare
from lightning_caq.quantizers.repair import measure_moments
from lightning_caq.quantizers.rounding.moments import input_moments
from lightning_caq.quantizers.rounding.passes import PairedPasses

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


class Tagger(nn.Module):
    """One class a token, no token seeing another."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x, attention_mask=None):
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture
def padded():
    """A network, and batches that differ in what stands at padded positions."""
    x = torch.randn(3, 4, 3)
    other = torch.where(MASK[..., None] > 0, x, 50.0)
    net = Tagger().eval()
    return net, [
        prepare(net, [{"x": t, "attention_mask": MASK}], 9, use=ModelUse(output="classes")) for t in (x, other)
    ]


def test_vectors_of_padding_are_dropped_or_zeroed(padded):
    net, (batches, _) = padded
    shapes = {}
    for how in ("shown", "dropped", "zeroed"):
        visit_modules(net, [net.first], batches, lambda m, x, y, how=how: shapes.update({how: x}), padding=how)
    assert shapes["shown"].shape == shapes["zeroed"].shape == (3, 4, 3)
    assert shapes["dropped"].shape == (9, 3)
    assert shapes["zeroed"][0, 3].tolist() == [0, 0, 0]


def test_moments_do_not_depend_on_what_padding_holds(padded):
    net, both = padded
    layers = find_layers(net, both[0][0])
    found = []
    for batches in both:
        moments = measure_moments(net, {"first": net.first}, batches)["first"]
        with PairedPasses(net, layers, batches, {}) as passes:
            curvature = input_moments(layers[0], net.first.weight.detach(), passes).curvature
        found.append((moments.mean, curvature))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    kept = both[0][0].data["x"][MASK > 0]
    torch.testing.assert_close(found[0][1][0], kept.T @ kept / len(kept))


def test_curvature_is_that_of_the_positions_that_count(padded):
    net, (first, other) = padded
    needs = {"needs": frozenset({"subspace", "amplification", "output_error"}), "bits": (4,)}
    a, b = measure(net, first, **needs), measure(net, other, **needs)
    for row in a.layers:
        twin = b[row.name]
        assert row.trace == pytest.approx(twin.trace, rel=1e-4)
        assert row.output_error[4] == pytest.approx(twin.output_error[4], rel=1e-4)
        assert row.carried_error[4] == pytest.approx(twin.carried_error[4], rel=1e-4)
