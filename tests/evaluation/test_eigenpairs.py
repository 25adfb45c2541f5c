from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from lightning_caq.evaluation.eigenpairs import profiles_by_eigenpairs
from lightning_caq.measures.measure import differentiable, measure
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.profile import CurvatureProfile

NEEDS = frozenset({"rounding_error", "subspace", "loss_change"})
BITS = (2, 4)


def task_loss(model, batch) -> Tensor:
    return F.cross_entropy(model(batch), batch.argmax(1) % 3)


@pytest.fixture(params=["distill", "task"])
def case(request):
    """A network, its profile with 6 eigenpairs, its rounding errors, and the dense Hessian over its weights."""
    torch.manual_seed(2)
    net, x = nets.mlp().double().eval(), torch.randn(32, 4, dtype=torch.float64)
    name = request.param
    loss_fn = task_loss if name == "task" else None
    layers = find_layers(net, x)
    profile = measure(
        net, [x], layers=layers, objective=name, loss_fn=loss_fn, needs=NEEDS, bits=BITS, samples=32, eigenpairs=6
    )
    weights = {layer.name: net.get_submodule(layer.name).weight.detach() for layer in layers}
    with torch.no_grad():
        target = net(x).softmax(1)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in weights.values()])
        live = {f"{n}.weight": p.view_as(w) for (n, w), p in zip(weights.items(), parts, strict=True)}

        class Bound:
            def __call__(self, batch):
                return functional_call(net, live, (batch,))

        if name == "task":
            return task_loss(Bound(), x)
        return F.kl_div(Bound()(x).log_softmax(1), target, reduction="batchmean")

    flat = torch.cat([w.flatten() for w in weights.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    deltas = {layer.name: nearest_errors(net, layer, BITS) for layer in layers}
    objective = make_objective(name, net, [x], loss_fn)
    return net, layers, objective, deltas, profile, hessian


def test_energies_are_those_of_the_dense_hessian(case) -> None:
    net, layers, objective, deltas, profile, hessian = case
    counts = (1, 3, 6, 10**6)
    with differentiable(net, layers):
        found = profiles_by_eigenpairs(net, layers, objective, deltas, profile, counts)
    assert list(found) == [1, 3, 6]
    values, vectors = torch.linalg.eigh(hessian)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    for k, known in found.items():
        start = 0
        for layer in layers:
            part = vectors[start : start + layer.weights, :k]
            start += layer.weights
            for b in BITS:
                along = (part.T @ deltas[layer.name][b].flatten()).square()
                expected = float(values[:k].abs() @ along)
                assert known[layer.name].subspace_energy[b] == pytest.approx(expected, rel=2e-3, abs=1e-9)
        outside = max(profile.trace - float(values[:k].sum()), 0.0) / (len(values) - k)
        assert known.residual_curvature == pytest.approx(outside, rel=2e-3, abs=1e-9)
        assert known.eigenvalues == pytest.approx(values[:k].tolist(), rel=1e-3)


def test_the_number_of_the_profile_gives_the_profile(case) -> None:
    net, layers, objective, deltas, profile, _ = case
    with differentiable(net, layers):
        found = profiles_by_eigenpairs(net, layers, objective, deltas, profile, ())
    (k,) = found
    assert k == len(profile.eigenvalues)
    for row in profile.layers:
        assert found[k][row.name].subspace_energy == pytest.approx(row.subspace_energy, rel=1e-6)
    assert found[k].residual_curvature == pytest.approx(profile.residual_curvature, rel=1e-6)


def test_without_a_spectrum_there_is_nothing_to_vary(case) -> None:
    net, layers, objective, deltas, _, _ = case
    assert profiles_by_eigenpairs(net, layers, objective, deltas, CurvatureProfile(())) == {}
