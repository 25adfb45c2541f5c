"""Hutchinson traces against the traces of dense Hessians."""

import nets
import torch

from lightning_caq.layers import find_layers
from lightning_caq.measures.hessian import Hessian
from lightning_caq.measures.hutchinson import layer_traces
from lightning_caq.objective import make_objective
from lightning_caq.seeding import generator


def _setup(name):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    blocks = dense.blocks(dense.hessian(nets.distill_loss(case)))
    operator = Hessian(case.net, layers, make_objective("distill", case.net, case.batches))
    return operator, torch.stack([b.trace() for b in blocks])


def test_is_unbiased_and_its_standard_error_covers():
    operator, truth = _setup("mlp")
    probes, runs = 12, 100
    means, errors = [], []
    for seed in range(runs):
        mean, error = layer_traces(operator, probes, [generator(seed, str(i)) for i in range(2)])
        means.append(mean)
        errors.append(error)
    means, errors = torch.stack(means), torch.stack(errors)
    # The mean of all runs lies within four of its own standard errors of the truth ...
    assert bool(((means.mean(0) - truth).abs() < 4 * means.std(0) / runs**0.5).all())
    # ... each run's own standard error is of the right size, and two of them cover about 93 % (t, 11 degrees).
    torch.testing.assert_close(errors.square().mean(0).sqrt(), means.std(0), rtol=0.25, atol=0)
    covered = ((means - truth).abs() <= 2 * errors).double().mean(0)
    assert bool((covered > 0.85).all())
    assert bool((covered < 1).all())


def test_is_exact_where_the_blocks_are_diagonal():
    """For signs v, vᵀ D v is the trace: one linear layer, one-hot inputs, squared error."""
    net, x = torch.nn.Linear(4, 1, bias=False), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    operator = Hessian(net, find_layers(net, x), make_objective("distill", net, [x]))
    mean, error = layer_traces(operator, 2, [generator(0, "x")])
    torch.testing.assert_close(mean, torch.tensor([(1 + 4 + 9 + 16) / 4], dtype=torch.float64))
    assert float(error) < 1e-6
