import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_caq.network.parts.baked import bake, is_computed, unbake

KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "mask": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_baked_layer_computes_the_same_and_can_be_given_back(name):
    layer, x = KINDS[name](nn.Linear(4, 5)), torch.randn(3, 4)
    layer(x)
    layer.eval()
    expected, kind, state = layer(x), type(layer), copy.deepcopy(layer.state_dict())
    assert is_computed(layer)
    bake(layer)
    assert type(layer) is nn.Linear
    assert not is_computed(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer(x), expected)
    unbake(layer)
    assert type(layer) is kind
    assert {key: value.tolist() for key, value in layer.state_dict().items()} == {
        key: value.tolist() for key, value in state.items()
    }
    assert torch.equal(layer(x), expected)


def test_a_layer_of_which_more_is_computed_is_left_alone():
    layer = prune.random_unstructured(nn.Linear(4, 5), "bias", 0.5)
    assert not is_computed(layer)
