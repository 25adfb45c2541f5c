from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_caq.network.layers import find_layers
from lightning_caq.network.parts.expand import every_weight_a_layer, expand, expand_uses


class Mixer(nn.Module):
    """A linear layer that is not called, a matrix of no layer, and a table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.qkv = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.mix, self.rows = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.words(x), self.qkv.weight, 2 * self.qkv.bias)
        return F.linear((h @ self.mix).tanh(), self.rows) @ self.words.weight.T


X = torch.tensor([[1, 2, 3], [4, 5, 6]])
PARTS = {"qkv_weight_linear", "mix_matmul", "rows_linear", "words_weight_linear"}


def test_a_weight_that_a_function_multiplies_by_is_a_layer_and_outputs_stay():
    net = Mixer()
    expected, keys = net(X), list(net.state_dict())
    with every_weight_a_layer(net):
        expand_uses(net, X)
        layers = {layer.name: layer for layer in find_layers(net, X)}
        torch.testing.assert_close(net(X), expected)
        parameters = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert {name: layer.modules for name, layer in layers.items()} == {
        "words": ("words", "words_weight_linear"),
        "qkv": ("qkv", "qkv_weight_linear"),
        "mix_matmul": ("mix_matmul",),
        "rows_linear": ("rows_linear",),
    }
    assert all(layer.calls for layer in layers.values())
    assert sum(layer.weights for layer in layers.values()) == parameters == 7 * 6 + 6 * 6 + 2 * 24
    assert (type(net), list(net.state_dict())) == (Mixer, keys)


def test_names_alone_bring_the_parts_back():
    net = Mixer()
    expand(net, ["words", *PARTS])
    assert set(dict(net.named_children())) == {"words", "qkv", *PARTS}
    torch.testing.assert_close(net(X), Mixer.forward(net, X))


def test_a_matrix_that_is_used_both_ways_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.code).relu() @ self.code.T

    net = Both()
    with every_weight_a_layer(net):
        expand_uses(net, torch.randn(2, 4))
        assert [name for name, _ in net.named_children()] == ["code_linear"]
