"""Output errors against layers that are called by hand with other weights."""

import nets
import pytest
import torch
from dense_case import layer_calls
from every import every

from lightning_caq.measures.rounding.output_error import output_errors
from lightning_caq.network.layers import find_layers


def _rms(parts, samples):
    return (sum(float(p.detach().square().sum()) for p in parts) / samples) ** 0.5


def _samples(case):
    return sum(len(next(iter(b.values())) if isinstance(b, dict) else b) for b in case.batches)


@every("name", nets.CASES)
def test_output_error_is_the_change_of_the_layers_output(name):
    case = nets.make_case(name)
    for layer in find_layers(case.net, case.batches[0]):
        delta = 0.1 * torch.randn(layer.shape, dtype=torch.float64)
        parts = []
        for module, z, before in layer_calls(case, layer):
            held = module.weight
            module._parameters["weight"] = held.detach() + delta
            parts.append(module(z) - before)
            module._parameters["weight"] = held
        found = output_errors(case.net, [layer], case.batches, {layer.name: {3: delta, 8: 2 * delta}})[layer.name]
        assert found[3] == pytest.approx(_rms(parts, _samples(case)), rel=1e-9)
        assert found[8] == pytest.approx(2 * found[3])
