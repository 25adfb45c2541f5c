"""The reference against norms that numpy computes."""

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.network.batches import take_samples
from lightning_caq.network.float_outputs import make_reference


@every("name", ["mlp", "cnn", "pixels", "dict", "regression"])
def test_the_error_is_the_distance_of_the_outputs_over_their_size(name):
    case = nets.make_case(name)
    reference = make_reference(case.net, case.batches)
    assert reference.error(case.net) == 0.0
    before = [case.output(case.net, x).detach().numpy() for x in case.batches]
    with torch.no_grad():
        for parameter in case.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = [case.output(case.net, x).detach().numpy() for x in case.batches]
    moved = sum(np.square(b - a).sum() for a, b in zip(before, after, strict=True))
    assert reference.error(case.net) == pytest.approx(np.sqrt(moved / sum(np.square(a).sum() for a in before)))


def test_where_the_float_network_gives_nothing_the_distance_itself_is_told():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    reference = make_reference(net, [torch.tensor([[3.0]])])
    net.weight.data.fill_(2.0)
    assert reference.error(net) == 6.0


def test_outputs_of_whole_batches_are_taken_over_and_cut_batches_are_run():
    net = nn.Linear(3, 2)
    batches, runs = [torch.randn(4, 3), torch.randn(4, 3)], []
    whole = make_reference(net, batches)
    net.register_forward_hook(lambda module, inputs, output: runs.append(len(output)))
    part = whole.on(net, take_samples(batches, 6))
    assert runs == [2]
    assert part.outputs[0] is whole.outputs[0]
    assert torch.equal(part.outputs[1].values, net(batches[1][:2]))
