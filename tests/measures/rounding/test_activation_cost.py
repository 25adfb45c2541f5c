"""Costs of rounded inputs against a network computed by hand in float64."""

import nets
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.measures.rounding.activation_cost import activation_costs
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.quantizers.grids.activations import fit_input_grid


def test_divergences_of_single_rounded_inputs():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    batches = [torch.randn(9, 4).double(), torch.randn(4, 4).double()]
    layers, bits = find_layers(net, batches[0]), (2, 4, 8)
    found = activation_costs(net, layers, batches, make_objective("distill", net, batches), bits)
    x = torch.cat(batches)
    with torch.no_grad():
        hidden = net[0](x).relu()
        p = F.softmax(net(x), 1)
        for column, b in enumerate(bits):
            outputs = (
                net(fit_input_grid(x, b).nearest(x).double()),
                net[2](fit_input_grid(hidden, b).nearest(hidden).double()),
            )
            for row, output in enumerate(outputs):
                kl = (p * (p.log() - F.log_softmax(output, 1))).sum(1).mean()
                torch.testing.assert_close(found[row, column], kl, rtol=1e-6, atol=1e-12)
    assert (found[:, :-1] > found[:, 1:]).all()


@every("name", ["cnn", "tied", "twice"])
def test_shapes_and_that_the_network_is_left_as_it_was(name):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    before = case.output(case.net, case.batches[0])
    costs = activation_costs(case.net, layers, case.batches, make_objective("distill", case.net, case.batches), (4, 8))
    assert costs.shape == (len(layers), 2)
    assert (costs > 0).all()
    assert torch.equal(case.output(case.net, case.batches[0]), before)


def test_an_embedding_costs_nothing():
    net, tokens = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)).eval(), torch.randint(0, 6, (5, 4))
    layers = find_layers(net, tokens)
    costs = activation_costs(net, layers, [tokens], make_objective("distill", net, [tokens]), (2, 4))
    assert costs[0].tolist() == [0, 0]
    assert (costs[1] > 0).all()
