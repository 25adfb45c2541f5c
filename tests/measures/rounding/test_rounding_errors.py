"""Rounding errors at a layer, at the network's output and in the loss, against direct computations in float64."""

import nets
import pytest
import torch
from torch import nn

from lightning_caq.measures.rounding.rounding_errors import (
    input_statistics,
    loss_change,
    nearest_errors,
    output_errors,
)
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


@pytest.fixture(params=nets.CASES)
def case(request):
    return nets.make_case(request.param)


def _rms(parts, samples):
    return (sum(float(p.detach().square().sum()) for p in parts) / samples) ** 0.5


def _calls(case, layer):
    """Module, input and output of every call of a layer, caught by hand."""
    seen, handles = [], []
    for module in {case.net.get_submodule(name) for name in layer.modules}:
        handles.append(
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out.clone())))
        )
    for batch in case.batches:
        case.output(case.net, batch)
    for handle in handles:
        handle.remove()
    return seen


def _samples(case):
    return sum(len(next(iter(b.values())) if isinstance(b, dict) else b) for b in case.batches)


def test_output_error_is_the_change_of_the_layers_output(case):
    for layer in find_layers(case.net, case.batches[0]):
        delta = 0.1 * torch.randn(layer.shape, dtype=torch.float64)
        parts = []
        for module, z, before in _calls(case, layer):
            held = module.weight
            module._parameters["weight"] = held.detach() + delta
            parts.append(module(z) - before)
            module._parameters["weight"] = held
        found = output_errors(case.net, [layer], case.batches, {layer.name: {3: delta, 8: 2 * delta}})[layer.name]
        assert found[3] == pytest.approx(_rms(parts, _samples(case)), rel=1e-9)
        assert found[8] == pytest.approx(2 * found[3])


def test_input_statistics():
    case = nets.make_case("cnn")
    layers = find_layers(case.net, case.batches[0])
    statistics = input_statistics(case.net, layers, case.batches)
    for layer in layers:
        inputs, found = [z.detach().flatten(1) for _, z, _ in _calls(case, layer)], statistics[layer.name]
        assert found.norm == pytest.approx(float(torch.cat(inputs).norm(dim=1).square().mean().sqrt()), rel=1e-6)
        spread = (inputs[0] - inputs[0].mean(0)).norm(dim=1)
        assert found.diameter == pytest.approx(2 * float(spread.max()), rel=1e-6)


def test_nearest_errors_are_within_half_a_step_of_the_grid_or_clipped():
    net = nn.Linear(30, 4)
    layer = find_layers(net, torch.randn(2, 30))[0]
    for bits, error in nearest_errors(net, layer, (2, 4, 8)).items():
        rounded = net.weight.detach() + error
        for row, source in zip(rounded, net.weight.detach(), strict=True):
            values = row[(row[:, None] - row).abs().lt(1e-6).int().argmax(dim=1)].unique()  # but for float noise
            assert len(values) <= 2**bits
            # Every weight went to the nearest of the values in use.
            nearest = values[(source[:, None] - values).abs().argmin(dim=1)]
            torch.testing.assert_close(row, nearest, rtol=0, atol=1e-6)


def test_loss_change_and_the_weight_is_put_back(case):
    objective = make_objective("distill", case.net, case.batches)
    layer = find_layers(case.net, case.batches[0])[0]
    weight = case.net.get_submodule(layer.name).weight
    before, delta = weight.detach().clone(), 0.2 * torch.randn(layer.shape, dtype=torch.float64)
    dense = nets.Dense(case.net, [layer.name])
    expected = nets.distill_loss(case)(dense.call(dense.vector + delta.flatten()))
    found = loss_change(case.net, layer, objective, delta, 0.0)
    assert found == pytest.approx(float(expected.detach()), rel=1e-9)
    assert torch.equal(weight, before)
