"""Moments of a layer's inputs against torch's own unfolding and sums written out."""

import nets
import pytest
import rounding_help
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.network.layer_matrix import columns
from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.quantizers.rounding import moments as module_under_test
from lightning_caq.quantizers.rounding.moments import damped, input_moments, samples_needed
from lightning_caq.quantizers.rounding.passes import PairedPasses, holding


def _rows(module, x):
    """Columns of a plain 2-d convolution by torch's own unfolding, one a row."""
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.double().transpose(1, 2).flatten(0, 1)


@every("groups", [1, 2])
def test_curvature_is_the_second_moment_of_the_columns(groups):
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(9, 4, 7, 7)
    (layer,) = find_layers(nn.Sequential(module), x)
    found = rounding_help.moments(nn.Sequential(module), layer, [x[:7], x[7:]], {})
    for g, part in enumerate(x.chunk(groups, dim=1)):
        z = _rows(module, part)
        torch.testing.assert_close(found.curvature[g].double(), z.T @ z / len(z), rtol=1e-5, atol=1e-6)
    assert not found.pull.any()


@every("outputs", [2, 9])  # fewer than half the columns, and more
def test_pull_is_how_the_float_outputs_differ_along_the_present_inputs(outputs):
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs)), torch.randn(40, 5)
    layer = find_layers(net, x)[1]
    floats = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    z_float = net[:2](x).detach().double()
    nn.init.normal_(net[0].weight)
    z = net[:2](x).detach().double()
    found = rounding_help.moments(net, layer, [x[:15], x[15:]], floats)
    torch.testing.assert_close(found.curvature[0].double(), z.T @ z / 40, rtol=1e-5, atol=1e-6)
    expected = net[2].weight.detach().double() @ (z_float - z).T @ z / 40
    torch.testing.assert_close(found.pull[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_few_positions_stand_for_all(monkeypatch):
    module, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(64, 2, 16, 16)
    (layer,) = find_layers(nn.Sequential(module), x)
    whole = rounding_help.moments(nn.Sequential(module), layer, [x], {}).curvature
    monkeypatch.setattr(module_under_test, "_COLUMNS", 64 * 64)
    part = rounding_help.moments(nn.Sequential(module), layer, [x], {}).curvature
    assert not torch.equal(whole, part)
    assert (whole - part).norm() < 0.1 * whole.norm()
    assert torch.equal(part, rounding_help.moments(nn.Sequential(module), layer, [x], {}).curvature)


def test_a_layer_used_twice_shows_both_inputs():
    net, x = nets.Twice(), torch.randn(9, 4)
    layer = find_layers(net, x)[0]
    z = torch.cat([x, torch.tanh(net.first(x))]).detach()
    torch.testing.assert_close(rounding_help.moments(net, layer, [x], {}).curvature[0], z.T @ z / len(z))


def test_words_and_layers_without_inputs_have_none():
    words, tokens = nets.Words(), torch.randint(0, 6, (3, 4))
    assert rounding_help.moments(words, find_layers(words, tokens)[0], [tokens], {}) is None
    idle = Layer("0", "linear", (3, 4), modules=("0",))
    assert rounding_help.moments(nn.Sequential(nn.Linear(4, 3)), idle, [torch.randn(2, 4)], {}) is None


class Routed(nn.Module):
    """Gives a layer only those samples that another layer likes."""

    def __init__(self):
        super().__init__()
        self.gate, self.expert = nn.Linear(3, 1), nn.Linear(3, 2)

    def forward(self, x):
        return self.expert(x[self.gate(x)[:, 0] > 0])


def test_samples_that_take_another_way_show_no_drift():
    net, x = Routed(), torch.randn(30, 3)
    with torch.no_grad():
        net.gate.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        net.gate.bias.zero_()
    layer = find_layers(net, x)[1]
    floats = {"gate.bias": torch.full((1,), 5.0)}
    z = x[x[:, 0] > 0]
    found = rounding_help.moments(net, layer, [x], floats)
    torch.testing.assert_close(found.curvature[0], z.T @ z / len(z))
    assert not found.pull.any()


def test_holding_puts_everything_back_whatever_happens():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    objects = list(net.parameters())

    def interrupted():
        with holding([(x, torch.zeros_like(x)) for x in net.state_dict(keep_vars=True).values()]):
            assert not net[0].weight.any()
            assert not net[1].running_var.any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(a is b for a, b in zip(objects, net.parameters(), strict=True))


def test_damping_makes_any_curvature_invertible():
    h = torch.stack([torch.zeros(3, 3), torch.ones(3, 3)])
    found = damped(h)
    torch.testing.assert_close(found[0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.ones(3, 3, dtype=torch.float64) + 0.01 * torch.eye(3))


def _columns_of(module, x):
    (layer,) = find_layers(nn.Sequential(module), x)
    z = columns(layer, module, x).movedim(0, 2).flatten(2)
    return layer, z.double()


@every(
    ("module", "shape"),
    [
        (nn.Linear(20, 3), (20,)),
        (nn.Linear(20, 3), (4, 20)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2), (4, 5, 5)),
        (nn.ConvTranspose2d(6, 2, 2, stride=2), (6, 2, 2)),
        (nn.ConvTranspose1d(6, 4, 3, stride=3, groups=2), (6, 2)),
    ],
)
def test_samples_that_are_needed_are_those_of_full_rank(module, shape):
    """Of random inputs: at the number that is told the moments have full rank, at one less they do not."""
    torch.manual_seed(6)
    net, x = nn.Sequential(module), torch.randn(64, *shape)
    layer, _ = _columns_of(module, x)
    (needed,) = samples_needed(net, [layer], 0).values()
    rows = _columns_of(module, x[:1])[1].shape[1]
    assert torch.linalg.matrix_rank(_columns_of(module, x[:needed])[1])[0] <= rows
    assert _columns_of(module, x[:needed])[1].shape[2] >= rows
    if needed > 1:
        assert _columns_of(module, x[: needed - 1])[1].shape[2] < rows
        assert torch.linalg.matrix_rank(_columns_of(module, x[: needed - 1])[1])[0] < rows
    assert samples_needed(net, [layer], needed) == {}


def test_words_and_idle_layers_need_no_samples():
    words, tokens = nets.Words(), torch.randint(0, 6, (3, 4))
    found = samples_needed(words, find_layers(words, tokens)[:1], 0)
    assert found == {}


def test_a_layer_that_other_samples_reach_has_no_moments():
    """As an expert has that only samples held out are sent to."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(2, 2)

        def forward(self, x):
            return self.expert(x) if x.sum() > 0 else x

    net, layer = Routed(), Layer("expert", "linear", (2, 2), calls=1, modules=("expert",))
    for sign in (1.0, -1.0):
        with PairedPasses(net, [layer], [sign * torch.ones(3, 2)], {}) as passes:
            assert (input_moments(layer, net.expert.weight.detach(), passes) is None) == (sign < 0)
