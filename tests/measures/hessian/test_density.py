"""Spectral densities and the recursion behind them on operators whose spectra are known."""

import nets
import pytest
import torch
from every import every
from scipy import stats

from lightning_caq.measures.hessian.density import spectral_density
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.krylov import tridiagonalise
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.seeding import generator

SEEDS = 200


def _matrix(values):
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T


def _density(matrix, seed=0, **kwargs):
    return spectral_density(lambda v: matrix @ v, matrix[0], generator(seed, "density"), **kwargs)


def test_recursion_gives_an_orthonormal_basis_and_the_matrix_in_it():
    matrix = _matrix(torch.linspace(-3, 50, 40, dtype=torch.float64))
    space = tridiagonalise(lambda v: matrix @ v, matrix[0], 25)
    basis, small = space.basis, space.matrix()
    assert (space.products, small.shape) == (25, (25, 25))
    torch.testing.assert_close(basis @ basis.T, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis @ matrix @ basis.T, small, rtol=0, atol=1e-10)
    # What is outside the space hangs on its last vector alone, with norm β.
    rest = basis @ matrix - small @ basis
    assert rest[:-1].norm() < 1e-10
    assert float(rest[-1].norm()) == pytest.approx(space.beta)


@every("dtype", [torch.float64, torch.float32])
def test_recursion_ends_when_the_space_closes(dtype):
    matrix = _matrix(torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0, -2.0], dtype=torch.float64)).to(dtype)
    space = tridiagonalise(lambda v: matrix @ v, torch.ones(6, dtype=dtype), 6)
    assert (space.products, space.beta, space.ended) == (3, 0.0, True)
    assert torch.linalg.eigvalsh(space.matrix()).tolist() == pytest.approx([-2, 1, 4], abs=1e-5)


def test_all_steps_give_the_spectrum_itself():
    values = torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 7.0], dtype=torch.float64)
    found = _density(_matrix(values), probes=3, steps=6)
    torch.testing.assert_close(found.nodes, values.expand(3, 6), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert found.products == 18


def test_moments_are_unbiased_and_their_standard_errors_cover():
    values = torch.cat([torch.tensor([5.0, -3.0, 2.0]), torch.linspace(-0.5, 1, 37)]).double()
    matrix, probes = _matrix(values), 20
    runs = [_density(matrix, seed, probes=probes, steps=3) for seed in range(SEEDS)]
    for power in (1, 2, 3):  # three steps are exact up to the fifth power
        found = torch.tensor([run.moment(power) for run in runs], dtype=torch.float64)
        truth = float((values**power).sum())
        means, errors = found[:, 0], found[:, 1]
        assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / SEEDS**0.5
        torch.testing.assert_close(errors.square().mean().sqrt(), means.std(), rtol=0.2, atol=0)
        # Draws of high powers are skewed by the largest eigenvalue, which costs few probes their coverage.
        covered = ((means - truth).abs() <= stats.t.ppf(0.975, probes - 1) * errors).double().mean()
        assert 0.88 <= float(covered) <= 0.99
    assert (runs[0].trace, runs[0].trace_of_squares) == (runs[0].moment(1), runs[0].moment(2))


def test_curve_against_the_smoothed_spectrum():
    values = torch.cat([torch.linspace(-1, 1, 150).pow(3), torch.tensor([6.0, 8.0])]).double()
    found = _density(_matrix(values), probes=20, steps=30)
    at, density, errors = found.curve(points=400, width=0.2)
    truth = torch.exp(-0.5 * ((at[:, None] - values) / 0.2) ** 2).mean(1) / (0.2 * (2 * torch.pi) ** 0.5)
    assert float(torch.trapezoid(density, at)) == pytest.approx(1, abs=1e-3)
    assert float((density - truth).abs().max()) < 0.05 * float(truth.max())
    # Where there is density, its standard error is of the right size.
    there = truth > 0.02 * truth.max()
    within = ((density - truth).abs() <= stats.t.ppf(0.975, 19) * errors)[there]
    assert float(within.double().mean()) > 0.8
    width_by_default = found.curve()
    assert [len(x) for x in width_by_default] == [512] * 3
    assert float(torch.trapezoid(width_by_default[1], width_by_default[0])) == pytest.approx(1, abs=1e-2)


def test_runs_that_end_early_count_in_full():
    """A probe that meets few eigenvalues has few nodes; all weights still sum to 1."""
    found = _density(torch.diag(torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64)), probes=4, steps=4)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4, dtype=torch.float64))
    assert found.trace == (pytest.approx(5), pytest.approx(0, abs=1e-9))
    constant = _density(3 * torch.eye(5, dtype=torch.float64), probes=2)
    assert constant.products == 2
    at, density, errors = constant.curve()
    assert float(at[density.argmax()]) == pytest.approx(3, abs=1e-2)
    assert float(errors.abs().max()) < 1e-9
    zero = _density(torch.zeros(5, 5, dtype=torch.float64), probes=2)
    assert zero.trace == (0.0, 0.0)
    assert all(bool(torch.isfinite(x).all()) for x in zero.curve())


def test_moments_of_a_networks_hessian():
    case = nets.make_case("mlp")
    layers = find_layers(case.net, case.batches[0])
    operator = Hessian(case.net, layers, make_objective("distill", case.net, case.batches))
    dense = nets.Dense(case.net, [x.name for x in layers]).hessian(nets.distill_loss(case))
    like = torch.zeros(operator.size, dtype=torch.float64)
    found = spectral_density(operator.product, like, generator(0, "density"), probes=40, steps=10)
    for (value, error), truth in ((found.trace, dense.trace()), (found.trace_of_squares, dense.square().sum())):
        assert abs(value - float(truth)) < 3.5 * error
        assert error < 0.5 * value
