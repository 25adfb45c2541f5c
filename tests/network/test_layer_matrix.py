"""A layer as a matrix, against the layer itself."""

import nets
import torch
from every import every
from torch import nn

from lightning_caq.network.layer_matrix import columns, count_positions, from_matrix, to_matrix
from lightning_caq.network.layers import quantizable_layers


def _linear():
    return nn.Linear(5, 3), (5,)


LAYERS = {**{k: lambda k=k: (nets.CONVOLUTIONS[k][0](), nets.CONVOLUTIONS[k][1]) for k in nets.CONVOLUTIONS},
          "linear": _linear, "tokens": lambda: (nn.Linear(5, 3), (2, 4, 5))}  # fmt: skip


def _setup(name):
    module, shape = LAYERS[name]()
    module.double()
    (layer,) = quantizable_layers(nn.Sequential(module))
    return module, layer, torch.randn(3, *shape, dtype=torch.float64)


def _without_bias(module, x):
    return module(x) - module(torch.zeros_like(x))


@every("name", LAYERS)
def test_matrix_times_columns_is_the_layer(name):
    module, layer, x = _setup(name)
    found = to_matrix(layer, module.weight) @ columns(layer, module, x)
    expected = _without_bias(module, x)
    if layer.kind == "linear":
        found, expected = found.transpose(2, 3).reshape(3, -1), expected.reshape(3, -1)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@every("name", LAYERS)
def test_round_trip(name):
    module, layer, _ = _setup(name)
    again = from_matrix(layer, to_matrix(layer, module.weight))
    assert torch.equal(again, module.weight)


@every("name", LAYERS)
def test_chosen_positions_are_those_of_all(name):
    module, layer, x = _setup(name)
    whole = columns(layer, module, x)
    assert count_positions(layer, module, x) == whole.shape[-1]
    chosen = torch.rand(len(x), whole.shape[-1]).argsort(1)[:, :3]
    expected = torch.stack([sample[..., places] for sample, places in zip(whole, chosen, strict=True)])
    assert torch.equal(columns(layer, module, x, chosen), expected)
