"""A layer as a matrix, against the layer itself."""

import nets
import pytest
import torch
from torch import nn

from lightning_caq.network.layer_matrix import columns, count_positions, from_matrix, to_matrix
from lightning_caq.network.layers import quantizable_layers


def _linear():
    return nn.Linear(5, 3), (5,)


LAYERS = {**{k: lambda k=k: (nets.CONVOLUTIONS[k][0](), nets.CONVOLUTIONS[k][1]) for k in nets.CONVOLUTIONS},
          "linear": _linear, "tokens": lambda: (nn.Linear(5, 3), (2, 4, 5))}  # fmt: skip


@pytest.fixture(params=LAYERS)
def setup(request):
    module, shape = LAYERS[request.param]()
    module.double()
    (layer,) = quantizable_layers(nn.Sequential(module))
    return module, layer, torch.randn(3, *shape, dtype=torch.float64)


def _without_bias(module, x):
    return module(x) - module(torch.zeros_like(x))


def test_matrix_times_columns_is_the_layer(setup):
    module, layer, x = setup
    found = to_matrix(layer, module.weight) @ columns(layer, module, x)
    expected = _without_bias(module, x)
    if layer.kind == "linear":
        found, expected = found.transpose(2, 3).reshape(3, -1), expected.reshape(3, -1)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


def test_round_trip(setup):
    module, layer, _ = setup
    again = from_matrix(layer, to_matrix(layer, module.weight))
    assert torch.equal(again, module.weight)


def test_chosen_positions_are_those_of_all(setup):
    module, layer, x = setup
    whole = columns(layer, module, x)
    assert count_positions(layer, module, x) == whole.shape[-1]
    chosen = torch.rand(len(x), whole.shape[-1]).argsort(1)[:, :3]
    expected = torch.stack([sample[..., places] for sample, places in zip(whole, chosen, strict=True)])
    assert torch.equal(columns(layer, module, x, chosen), expected)
