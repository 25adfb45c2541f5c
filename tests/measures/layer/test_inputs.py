"""Statistics of inputs against inputs that were caught by hand."""

import nets
import pytest
import torch
from dense_case import layer_calls

from lightning_caq.measures.layer.inputs import input_statistics
from lightning_caq.network.layers import find_layers


def test_input_statistics():
    case = nets.make_case("cnn")
    layers = find_layers(case.net, case.batches[0])
    statistics = input_statistics(case.net, layers, case.batches)
    for layer in layers:
        inputs, found = [z.detach().flatten(1) for _, z, _ in layer_calls(case, layer)], statistics[layer.name]
        assert found.norm == pytest.approx(float(torch.cat(inputs).norm(dim=1).square().mean().sqrt()), rel=1e-6)
        spread = (inputs[0] - inputs[0].mean(0)).norm(dim=1)
        assert found.diameter == pytest.approx(2 * float(spread.max()), rel=1e-6)
