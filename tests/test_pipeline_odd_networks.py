"""``quantize`` on weights of odd sizes and scales, names that look like patterns, and sequences of several lengths."""

import itertools

import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import OptionError

FAST = {"avg_bits": 3, "compare": (), "guard": False, "curvature_samples": 16, "eigenpairs": 4}


def _mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12, bias=bias), nn.ReLU(), nn.Linear(12, 3, bias=bias))


def test_weights_of_any_scale():
    for exponent, rounding in itertools.product((-38, -30, -22, -18, 10), ("error_feedback", "long_axis")):
        for scaled in ((0,), (2,), (0, 2)):
            net = _mlp(bias=False)
            with torch.no_grad():
                for index in scaled:
                    net[index].weight.mul_(10.0**exponent)
            quantize(net, [torch.randn(60, 6)], rounding=rounding, **FAST)
            assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_weights_are_left_alone():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.none = _mlp(), nn.Linear(6, 0)

        def forward(self, x):
            return torch.cat([self.net(x), self.none(x)], 1)

    assert set(quantize(Empty(), [torch.randn(60, 6)], **FAST).plan.bits) == {"net.0", "net.2"}


def test_sequences_of_several_lengths():
    for lengths in ((3, 5, 7, 2), (1, 9)):
        net = _mlp()
        result = quantize(net, [torch.randn(12, length, 6) for length in lengths], **FAST)
        assert set(result.plan.bits) == {"0", "2"}


def test_names_with_brackets_are_names_before_they_are_patterns():
    class Named(nn.ModuleDict):
        def __init__(self):
            super().__init__({name: nn.Linear(6, 6) for name in ("a[0]", "a0", "b0")})

        def forward(self, x):
            return sum(module(x) for module in self.values())

    for option, kept in (
        ({"include": ["a[0]"]}, {"a[0]"}),
        ({"exclude": ["a[0]"]}, {"a0", "b0"}),
        ({"include": ["[ab]0"]}, {"a0", "b0"}),
        ({"deployed": ["a[0]"]}, {"a[0]"}),
    ):
        assert set(quantize(Named(), [torch.randn(60, 6)], **option, **FAST).plan.bits) == kept
    with pytest.raises(OptionError, match="matches no layer"):
        quantize(Named(), [torch.randn(60, 6)], include=["c[0]"], **FAST)
