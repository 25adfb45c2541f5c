import pytest
import torch
from parts_help import assert_close
from torch import nn

from lightning_caq.network.hooks import watching
from lightning_caq.network.parts.expand import every_weight_a_layer, expanded

transformers = pytest.importorskip("transformers")


def experts(implementation: str) -> nn.Module:
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    config._experts_implementation = implementation
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    net = MixtralExperts(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def test_experts_one_by_one_and_stacked_are_those_of_the_model():
    states, chosen = torch.randn(6, 16), torch.randint(4, (6, 2))
    weights = torch.rand(6, 2)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        net = experts(implementation)
        expected = net(states, chosen, weights)
        with expanded(net):
            assert len(list(net.children())) == 1 + 8  # an activation, and two matrices for each of four experts
            assert_close(net(states, chosen, weights), expected)
        with every_weight_a_layer(net):
            shapes: list[torch.Size] = []
            part = net.get_submodule(f"down_proj_{int(chosen[0, 0])}")
            with watching([part], lambda module, x, y, shapes=shapes: shapes.append(x.shape)):
                assert_close(net(states, chosen, weights), expected)
            assert shapes == [(int((chosen == chosen[0, 0]).sum()), 24)]


def test_a_gradient_reaches_the_stack():
    net = experts("grouped_mm")
    with expanded(net):
        net(torch.randn(6, 16), torch.randint(4, (6, 2)), torch.rand(6, 2)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
