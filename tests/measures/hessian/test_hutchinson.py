"""Hutchinson and Hutch++ against the traces of dense Hessians, and the coverage of their errors."""

import nets
import pytest
import torch
from every import every
from scipy import stats

from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.measures.hessian.hutchinson import estimate_layer_traces
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.utilities.seeding import generator


def layer_traces(operator, probes, generators):
    """Plain Hutchinson with so many probes: no subspace, and a tolerance that no error meets."""
    found = estimate_layer_traces(operator, generators, tolerance=0.0, rank=0, max_probes=probes)
    return found.values, found.errors


SEEDS = 200


def _setup(name):
    case = nets.make_case(name)
    case.net.requires_grad_(True)
    layers = find_layers(case.net, case.batches[0])
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    blocks = dense.blocks(dense.hessian(nets.distill_loss(case)))
    return Hessian(case.net, layers, make_objective("distill", case.net, case.batches)), blocks


class DenseOperator:
    """Stands in for the Hessian where hundreds of runs are wanted."""

    def __init__(self, blocks):
        self._blocks = blocks
        self.sizes = [len(block) for block in blocks]

    def split(self, vector):
        return list(vector.split(self.sizes))

    def like(self, vector):
        return vector.double()

    def layer_products(self, vectors):
        return [block @ v for block, v in zip(self._blocks, vectors, strict=True)]

    def layer_quadratics(self, vectors):
        return [float(v @ p) for v, p in zip(vectors, self.layer_products(vectors), strict=True)]


def _traces(blocks):
    return torch.stack([block.trace() for block in blocks])


def _generators(operator, seed):
    return [generator(seed, str(i)) for i in range(len(operator.sizes))]


def _check(means, errors, truth, probes):
    """Unbiased, errors of the right size, and 95 % intervals by Student's t that hold the truth in 88 to 99 %."""
    assert bool(((means.mean(0) - truth).abs() < 4 * means.std(0) / len(means) ** 0.5).all())
    torch.testing.assert_close(errors.square().mean(0).sqrt(), means.std(0), rtol=0.2, atol=0)
    reach = stats.t.ppf(0.975, probes - 1) * errors
    covered = ((means - truth).abs() <= reach).double().mean(0)
    assert bool(((covered >= 0.88) & (covered <= 0.99)).all()), covered


@every("probes", [5, 12])
def test_traces_are_unbiased_and_their_standard_errors_cover(probes):
    blocks = _setup("mlp")[1]
    operator = DenseOperator(blocks)
    runs = [layer_traces(operator, probes, _generators(operator, seed)) for seed in range(SEEDS)]
    _check(torch.stack([m for m, _ in runs]), torch.stack([e for _, e in runs]), _traces(blocks), probes)


@every("name", nets.CASES)
def test_traces_of_every_case(name):
    operator, blocks = _setup(name)
    found = estimate_layer_traces(operator, _generators(operator, 0), tolerance=0.2, max_probes=64)
    reach = stats.t.ppf(0.9999, found.probes - 1) * found.errors
    assert bool(((found.values - _traces(blocks)).abs() <= reach + 1e-12).all())


def test_stopping_rule_stops_as_soon_as_it_may():
    """At the first count at which every layer's error, widened by Student's t, is small enough."""
    operator = DenseOperator(_setup("mlp")[1])
    loose = estimate_layer_traces(operator, _generators(operator, 3), tolerance=2.0, rank=0)
    assert (loose.probes, bool(loose.converged.all())) == (4, True)
    counts = range(4, 120)
    runs = [layer_traces(operator, n, _generators(operator, 3)) for n in counts]
    for tolerance, share in ((0.1, 0.0), (0.1, 2.0)):
        for n, (means, errors) in zip(counts, runs, strict=True):
            limit = tolerance * torch.maximum(means, share * means.sum())
            if bool((stats.t.ppf(0.975, n - 1) / 1.96 * errors <= limit).all()):
                break
        assert 4 < n < 119
        draws = _generators(operator, 3)
        found = estimate_layer_traces(operator, draws, tolerance=tolerance, share=share, rank=0, max_probes=119)
        assert (found.probes, found.products, bool(found.converged.all())) == (n, n, True)
        torch.testing.assert_close((found.values, found.errors), (means, errors))


def test_a_layer_that_has_not_converged_says_so():
    operator, _ = _setup("mlp")
    found = estimate_layer_traces(operator, _generators(operator, 0), tolerance=1e-6, rank=0, max_probes=6)
    assert (found.probes, bool(found.converged.any())) == (6, False)
    mixed = estimate_layer_traces(operator, _generators(operator, 0), tolerance=0.05, share=0.0, rank=0, max_probes=6)
    ratio = stats.t.ppf(0.975, 5) / 1.96 * mixed.errors / mixed.values
    assert mixed.converged.tolist() == (ratio <= 0.05).tolist()


@every(("rank", "tolerance"), [(0, 0.15), (2, 0.1)])
def test_intervals_after_a_stop_still_hold(rank, tolerance):
    """A rule that looks at the draws favours lucky ones, and few draws are skewed: intervals pay a little for it."""
    blocks = _setup("mlp")[1]
    operator = DenseOperator(blocks)
    truth, held, means, probes = _traces(blocks), [], [], []
    for seed in range(SEEDS):
        found = estimate_layer_traces(
            operator, _generators(operator, seed), tolerance=tolerance, rank=rank, max_probes=1000
        )
        assert bool(found.converged.all())
        assert found.products == found.probes + 2 * rank
        reach = stats.t.ppf(0.975, found.probes - 1) * found.errors
        held.append((found.values - truth).abs() <= reach)
        means.append(found.values)
        probes.append(found.probes)
    covered = torch.stack(held).double().mean(0)
    assert len(set(probes)) > 5  # the rule did decide
    assert bool(((covered >= 0.85) & (covered <= 0.99)).all()), covered
    torch.testing.assert_close(torch.stack(means).mean(0), truth, rtol=0.03, atol=0)


def test_a_subspace_saves_products_where_eigenvalues_decay():
    blocks = [_matrix(torch.arange(1, n + 1, dtype=torch.float64) ** -1.5) for n in (40, 60)]
    operator = DenseOperator(blocks)
    plain, deflated = (
        [estimate_layer_traces(operator, _generators(operator, s), rank=r, max_probes=2000) for s in range(10)]
        for r in (0, 8)
    )
    assert sum(x.products for x in deflated) < 0.25 * sum(x.products for x in plain)
    off = torch.stack([x.values for x in deflated]) / _traces(blocks) - 1
    assert float(off.square().mean().sqrt()) < 0.05


def test_layers_smaller_than_the_subspace_are_exact():
    blocks = [
        _matrix(torch.tensor([3.0, -1.0, 0.5]).double()),
        _matrix(torch.linspace(0, 1, 40).double()),
        0 * torch.eye(5),
    ]
    operator = DenseOperator([block.double() for block in blocks])
    found = estimate_layer_traces(operator, _generators(operator, 0), rank=8)
    assert found.values[[0, 2]].tolist() == pytest.approx([2.5, 0.0], abs=1e-12)
    assert found.errors[[0, 2]].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert abs(float(found.values[1]) - 20) < 5 * float(found.errors[1])
    assert bool(found.converged.all())


def test_is_exact_where_the_blocks_are_diagonal():
    """For signs v, vᵀ D v is the trace: one linear layer, one-hot inputs, squared error."""
    net, x = torch.nn.Linear(4, 1, bias=False), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    operator = Hessian(net, find_layers(net, x), make_objective("distill", net, [x]))
    mean, error = layer_traces(operator, 2, [generator(0, "x")])
    torch.testing.assert_close(mean, torch.tensor([(1 + 4 + 9 + 16) / 4], dtype=torch.float64))
    assert float(error) < 1e-6


def _matrix(values):
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T
