"""Convolutions with separate nodes against torch's own, to rounding in float64."""

import contextlib
import itertools

import torch
from every import every
from torch import nn

from lightning_caq.measures.hessian.convolutions import SeparateConvolutions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _derivatives(first, second, x, context):
    """A loss, its gradients, products with the whole Hessian and with its diagonal blocks."""
    weights = [first.weight, second.weight]
    with context:
        loss = second(torch.tanh(first(x))).pow(3).sum()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
    vectors = [0.3 + w.detach() for w in weights]
    whole = torch.autograd.grad(gradients, weights, vectors, retain_graph=True)
    blocks = [
        torch.autograd.grad(g, w, v, retain_graph=True)[0] for g, w, v in zip(gradients, weights, vectors, strict=True)
    ]
    return [loss.detach(), *(g.detach() for g in gradients), *whole, *blocks]


@every(
    ("dims", "stride", "padding", "dilation", "groups"),
    list(itertools.product((1, 2, 3), (1, 3), (0, 2), (1, 2), (1, 2))),
)
def test_second_derivatives_are_those_of_torch(dims, stride, padding, dilation, groups):
    kind, size = CONVOLUTIONS[dims - 1], 6 if dims < 3 else 5
    first = kind(2, 2, 2).double()
    second = kind(2, 2, 2, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False).double()
    first.bias.requires_grad_(False)
    x = torch.randn(2, 2, *[size] * dims, dtype=torch.float64)
    usual = _derivatives(first, second, x, contextlib.nullcontext())
    separate = _derivatives(first, second, x, SeparateConvolutions())
    for mine, theirs in zip(separate, usual, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@every("padding", ["same", 1])
def test_what_it_does_not_handle_takes_the_usual_path(padding):
    conv = nn.Conv2d(2, 3, 3, padding=padding)  # with a trained bias
    x = torch.randn(2, 2, 5, 5)
    with SeparateConvolutions():
        y, alone = conv(x), conv(x[0])
    torch.testing.assert_close(y, conv(x))
    torch.testing.assert_close(alone, conv(x[0]))
    assert torch.autograd.grad(y.sum(), conv.bias)[0].tolist() == [50.0] * 3
