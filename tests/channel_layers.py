"""Layers of eight channels or more, and the bits of each channel."""

import torch
from torch import nn

from lightning_caq.network.layers import find_layers

WIDTHS = (2, 5, 3, 8, 2, 4, 1, 3)
CHANNEL_LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (6,)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8), (8, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 2, stride=2), (3, 3, 3)),
    "transposed_groups": (lambda: nn.ConvTranspose2d(4, 16, 2, groups=2), (4, 3, 3)),
}


def one_layer(name):
    torch.manual_seed(0)
    make, shape = CHANNEL_LAYERS[name]
    net, x = nn.Sequential(make()), torch.randn(40, *shape)
    (layer,) = find_layers(net, x)
    return net, layer, x


def channel(layer, tensor, c):
    return tensor.select(1 if layer.transposed else 0, c)
