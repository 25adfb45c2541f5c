"""κ against closed forms and dense Hessians, ρ against second differences by hand."""

import nets
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.measures.layer.kappa import remainder, second_order_sensitivity
from lightning_caq.network.layers import find_layers
from lightning_caq.utilities.seeding import generator


def _blocks(net, x):
    net.eval()
    return record_blocks(net, find_layers(net, x), x)


def _kappa(block, **kwargs):
    return second_order_sensitivity(block, generator(0, "kappa"), **{"iterations": 3000, "tolerance": 1e-9, **kwargs})


@every("name", nets.CONVOLUTIONS)
def test_kappa_of_affine_layers_is_twice_the_squared_norm(name):
    make, shape = nets.CONVOLUTIONS[name]
    module = make().double()
    (block,) = _blocks(nn.Sequential(module), torch.randn(2, *shape, dtype=torch.float64)).values()
    matrix = nets.dense_operator(lambda z: module(z) - module(torch.zeros_like(z)), shape)
    expected = 2 * float(torch.linalg.svdvals(matrix)[0]) ** 2
    assert _kappa(block)[0] == pytest.approx(expected, rel=1e-4)
    value, change = second_order_sensitivity(block, generator(0, "kappa"))
    assert 0.9 * expected < value <= expected * (1 + 1e-9)  # a lower bound at the default effort
    assert change <= 1e-2 or value > 0.99 * expected


@every("activation", [nn.Tanh(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True)])
def test_kappa_with_what_follows_against_dense_hessians(activation):
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), activation).double()
    nets.shake_batchnorm(net)
    x = torch.randn(7, 4, dtype=torch.float64)
    (block,) = _blocks(net, x).values()
    dense = [torch.func.hessian(lambda z: net(z[None]).square().sum())(z).detach() for z in x]
    expected = max(float(torch.linalg.eigvalsh(h).abs().max()) for h in dense)
    assert _kappa(block)[0] == pytest.approx(expected, rel=1e-5)


def test_a_negative_curvature_counts_by_its_magnitude():
    """s = tanh(z)² falls off at z = 1: its second derivative is 2 (1 − t²)(1 − 3t²) < 0."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    with torch.no_grad():
        net[0].weight.fill_(1)
    t = torch.tanh(torch.tensor(1.0)).item()
    (block,) = _blocks(net, torch.ones(1, 1, dtype=torch.float64)).values()
    assert _kappa(block)[0] == pytest.approx(-2 * (1 - t * t) * (1 - 3 * t * t))


def test_dead_units_have_no_curvature():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with torch.no_grad():
        net[0].bias.fill_(-100)
    (block,) = _blocks(net, torch.randn(4, 3)).values()
    assert _kappa(block) == (0.0, 0.0)
    assert remainder(block, generator(0, "rho")) == 0


def test_power_iteration_beats_the_mean_over_random_vectors():
    """Why the proposal's estimator is not used: it is far below an operator norm."""
    net = nn.Sequential(nn.Linear(200, 3)).double()
    (block,) = _blocks(net, torch.randn(2, 200, dtype=torch.float64)).values()
    hessian = 2 * net[0].weight.detach().T @ net[0].weight.detach()
    v = torch.randint(0, 2, (500, 200)).mul(2).sub(1).double()
    average = float(((v @ hessian).norm(dim=1) / v.norm(dim=1)).mean())
    assert _kappa(block)[0] == pytest.approx(float(torch.linalg.matrix_norm(hessian, 2)), rel=1e-6)
    assert average < 0.3 * _kappa(block)[0]


def test_remainder_of_affine_layers_is_rounding_noise():
    (block,) = _blocks(nn.Sequential(nn.Linear(5, 4).double()), torch.randn(6, 5, dtype=torch.float64)).values()
    assert remainder(block, generator(0, "rho")) < 1e-12


def test_remainder_sees_a_kink_within_the_radius():
    """relu(z − z₀) bends only within r = z₀/16 of z₀: there ‖bend‖/(2 r²) = 1/(2 r)."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.fill_(1)
        net[0].bias.fill_(-2)
    for z, expected in ((2.0, 1 / (2 * 2 / 16)), (2.5, 0.0), (1.5, 0.0)):
        (block,) = _blocks(net, torch.full((1, 1), z, dtype=torch.float64)).values()
        assert remainder(block, generator(0, "rho")) == pytest.approx(expected, abs=1e-9)


def test_remainder_of_a_smooth_function():
    """½ |tanh''| at a point, up to the size of the radius."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    with torch.no_grad():
        net[0].weight.fill_(1)
    (block,) = _blocks(net, torch.full((1, 1), 0.7, dtype=torch.float64)).values()
    t = torch.tanh(torch.tensor(0.7)).item()
    assert remainder(block, generator(0, "rho")) == pytest.approx(t * (1 - t * t), rel=1e-2)


def test_a_sample_of_zeros_does_not_blow_up_the_remainder():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    x = torch.randn(6, 4)
    (block,) = _blocks(net, x).values()
    expected = remainder(block, generator(0, "rho"))
    (block,) = _blocks(net, torch.cat([x, torch.zeros(1, 4)])).values()
    assert remainder(block, generator(0, "rho")) < 10 * expected + 1e-3
    (block,) = _blocks(net, torch.zeros(2, 4)).values()
    assert remainder(block, generator(0, "rho")) == 0


def test_of_many_samples_the_largest_is_found():
    """Samples are screened by a few products; the largest norm of all must be among those iterated to the end."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh()).double()
    x = 2 * torch.randn(60, 6, dtype=torch.float64)
    layer = find_layers(net, x)[0]
    block = record_blocks(net, [layer], x)[layer.name]
    hessian = torch.func.vmap(torch.func.hessian(lambda z: net(z).square().sum()))(x)
    truth = float(torch.linalg.matrix_norm(hessian, ord=2).max().detach())
    kappa, _ = second_order_sensitivity(block, generator(0, "kappa"), iterations=500, tolerance=1e-9)
    assert kappa == pytest.approx(truth, rel=1e-3)
