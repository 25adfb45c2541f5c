"""Carried errors against dense Jacobians in float64."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.rounding.carried import carried_errors
from lightning_caq.measures.rounding.output_error import output_errors
from lightning_caq.network.layers import find_layers


def _deltas(layers):
    return {x.name: {b: 0.1 / b * torch.randn(x.shape, dtype=torch.float64) for b in (2, 3)} for x in layers}


def _dense(case, layers, deltas, b):
    """J_i Δ_i z_i of every output, from the Jacobian by the weight; (layers, all outputs)."""
    rows = []
    for layer in layers:
        dense = nets.Dense(case.net, [layer.name])
        parts = [dense.jacobian(lambda net, x=x: case.output(net, x)).flatten(0, 1) for x in case.batches]
        rows.append(torch.cat(parts) @ deltas[layer.name][b].flatten())
    return torch.stack(rows)


@every("name", [name for name in nets.CASES if name not in {"pixels", "tied"}])
@every("memory", [2**28, 1])
def test_few_outputs_are_exact(name, memory):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    deltas = _deltas(layers)
    found = carried_errors(case.net, layers, case.batches, deltas, {}, memory=memory)
    samples = sum(len(next(iter(x.values())) if isinstance(x, dict) else x) for x in case.batches)
    for b in (2, 3):
        expected = _dense(case, layers, deltas, b)
        gram = expected @ expected.T / samples
        assert torch.allclose(found.gram({x.name: b for x in layers}), gram, rtol=1e-8, atol=1e-12)
        direct = output_errors(case.net, layers, case.batches, deltas)
        for i, layer in enumerate(layers):
            assert found.at_output(layer.name, b) == pytest.approx(float(gram[i, i]) ** 0.5, rel=1e-8)
            assert found.errors[layer.name][b] == pytest.approx(direct[layer.name][b], rel=1e-8)


@every("name", ["pixels", "tied"])
def test_many_outputs_are_estimated_without_bias(name):
    case = nets.make_case(name)
    if name == "tied":
        case = nets.Case(case.net, [torch.randint(0, 6, (40, 4))])
    else:
        case = nets.Case(case.net, [torch.randn(40, 2, 4, 4, dtype=torch.float64)])
    layers = find_layers(case.net, case.batches[0])
    deltas = _deltas(layers)
    expected = _dense(case, layers, deltas, 2)
    found = carried_errors(case.net, layers, case.batches, deltas, {}).gram({x.name: 2 for x in layers})
    scale = (expected @ expected.T).diagonal().sqrt() / 40**0.5
    # 40 samples with 16 probes each: a standard error of about √(2 / 640) = 6 % of a squared norm.
    assert float(((found - expected @ expected.T / 40) / torch.outer(scale, scale)).abs().max()) < 0.2


def test_a_shift_of_a_layer_is_carried_with_its_error():
    """The shift of a bias is one more parameter of the Jacobian."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    case = nets.Case(net, [torch.randn(5, 2, 3, 3, dtype=torch.float64)])
    layers = find_layers(net, case.batches[0])[:1]
    delta, shift = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = carried_errors(net, layers, case.batches, {"0": {2: delta}}, {"0": {2: shift}})
    parameters = {name: x.detach() for name, x in net.named_parameters()}
    changes = {"0.weight": delta, "0.bias": shift}
    tangents = {name: changes.get(name, torch.zeros_like(x)) for name, x in parameters.items()}
    _, moved = torch.func.jvp(
        lambda p: torch.func.functional_call(net, p, (case.batches[0],)), (parameters,), (tangents,)
    )
    assert torch.allclose(found.components["0"][2], moved)
    error = nn.functional.conv2d(case.batches[0], delta, shift)
    assert found.errors["0"][2] == pytest.approx(float(error.square().sum() / 5) ** 0.5)


def test_probes_do_not_depend_on_how_samples_are_cut():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 20)).double().eval()
    x = torch.randn(6, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    deltas = _deltas(layers)
    whole = carried_errors(net, layers, [x], deltas, {}, seed=3)
    cut = carried_errors(net, layers, [x[:4], x[4:]], deltas, {}, seed=3, memory=1)
    other = carried_errors(net, layers, [x], deltas, {}, seed=4)
    assert torch.allclose(whole.components["0"][2], cut.components["0"][2])
    assert not torch.allclose(whole.components["0"][2], other.components["0"][2])


class TokensFirst(nn.Module):
    """Works on (tokens, samples, features) inside, as some transformers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.transpose(0, 1))).mean(0))


def test_samples_along_another_axis_are_run_one_by_one():
    net = TokensFirst().double().eval()
    case = nets.Case(net, [torch.randn(4, 2, 3, dtype=torch.float64)])
    layers = find_layers(net, case.batches[0])
    deltas = _deltas(layers)
    dense = nets.Dense(net, ["first"])
    expected = dense.jacobian(lambda f: f(case.batches[0])).flatten(0, 1) @ deltas["first"][2].flatten()
    found = carried_errors(net, layers, case.batches, deltas, {})
    assert found.at_output("first", 2) == pytest.approx(float(expected.square().sum() / 4) ** 0.5, rel=1e-8)


def test_a_layer_without_effect_carries_nothing():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.lost, self.idle = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.lost(x)
            return self.used(x)

    net, x = Idle().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    layers = find_layers(net, x)
    found = carried_errors(net, layers, [x], _deltas(layers), {})
    assert found.at_output("used", 2) > 0
    assert found.at_output("lost", 2) == found.at_output("idle", 2) == 0
    assert found.errors["lost"][2] > 0 == found.errors["idle"][2]


def test_a_chain_of_linear_maps_attains_the_bound():
    """An error along the steepest direction is stretched by the whole σ_max of what follows."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    layer = find_layers(net, x)[0]
    after = (net[2].weight @ net[1].weight).detach()
    steepest = torch.linalg.svd(after).Vh[0]
    deltas = {3: torch.outer(steepest, torch.randn(4, dtype=torch.float64)), 4: torch.randn(4, 4, dtype=torch.float64)}
    found = carried_errors(net, [layer], [x], {"0": deltas}, {})
    before = output_errors(net, [layer], [x], {"0": deltas})["0"]
    bound = float(torch.linalg.svdvals(after)[0])
    assert found.at_output("0", 3) / before[3] == pytest.approx(bound)
    assert found.at_output("0", 4) / before[4] < bound


def test_no_more_samples_are_run_at_a_time_than_their_tensors_and_their_graph_allow():
    net, x, seen = nn.Sequential(nn.Linear(4, 10)), torch.randn(12, 4), []
    (layer,) = layers = find_layers(net, x)
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    # A sample has ten outputs of four bytes: one for each of two bit-widths, and eight for what the graph holds.
    deltas = {layer.name: {b: torch.zeros(10, 4) for b in (2, 3)}}
    carried_errors(net, layers, [x], deltas, {}, memory=5 * 10 * 4 * (2 + 8))
    assert seen[1:] == [5, 5, 2]  # after the two samples that are tried
