from __future__ import annotations

import functools

import nets
import pytest
import torch
from every import every

from lightning_caq.evaluation.shares import error_shares, observed_errors, rounding_energies, subspace_shares
from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.measure import differentiable, measure
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.float_outputs import make_reference
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.studies import Energy
from lightning_caq.utilities.contexts import curvature_safe

ROWS = (
    LayerCurvature("a", 8, 2, 8, carried_error={2: 1.0}, subspace_energy={2: 0.4}, second_order={2: 0.6}),
    LayerCurvature("b", 8, 2, 8, output_error={2: 0.5}),
    LayerCurvature("c", 8, 2, 8),
)


def test_shares_hold_what_is_known_and_none_where_it_is_not() -> None:
    found = error_shares(CurvatureProfile(ROWS), {"b": 2, "a": 2}, {"b": 0.3})
    assert [(s.name, s.predicted, s.observed) for s in found] == [("a", 1.0, None), ("b", None, 0.3)]
    a, b = subspace_shares(CurvatureProfile(ROWS), {"a": 2, "b": 2}, {"b": Energy(1.0, 2.0)})
    assert (a.nearest, a.chosen) == (Energy(0.2, pytest.approx(0.1)), None)
    assert (b.nearest, b.chosen) == (None, Energy(1.0, 2.0))


def test_shares_of_indefinite_energies_count_magnitudes() -> None:
    assert Energy(1.0, -3.0).share == 0.25
    assert Energy(0.0, 0.0).share is None


@every("name", ["mlp", "cnn", "tied", "dict"])
def test_observed_errors_are_those_of_networks_with_one_weight_replaced(name) -> None:
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    errors = {layer.name: nearest_errors(case.net, layer, [2])[2] for layer in layers}
    before = {key: x.clone() for key, x in case.net.state_dict().items()}
    found = observed_errors(case.net, layers, make_reference(case.net, case.batches), errors, {})
    assert all(torch.equal(x, before[key]) for key, x in case.net.state_dict().items())
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    samples = sum(len(next(iter(b.values())) if isinstance(b, dict) else b) for b in case.batches)
    for i, layer in enumerate(layers):
        moved = dense.vector.clone()
        start = sum(dense.sizes[:i])
        moved[start : start + dense.sizes[i]] += errors[layer.name].flatten()
        with torch.no_grad():
            total = sum(
                float((case.output(dense.call(moved), b) - case.output(case.net, b)).square().sum())
                for b in case.batches
            )
        assert found[layer.name] == pytest.approx((total / samples) ** 0.5)


@every("objective", ["distill", "task"])
def test_energies_are_those_of_the_dense_eigenspace(objective) -> None:
    case, k = nets.make_case("mlp"), 5

    def loss_fn(model, batch):
        return nets.task_loss(case.output(model, batch))

    layers = find_layers(case.net, case.batches[0])
    kind = {"objective": objective, "loss_fn": loss_fn if objective == "task" else None}
    profile = measure(case.net, case.batches, needs=frozenset({"subspace"}), bits=(3,), samples=8, eigenpairs=k, **kind)
    errors = {layer.name: nearest_errors(case.net, layer, [3])[3] for layer in layers}
    target = make_objective(objective, case.net, case.batches, kind["loss_fn"])
    with curvature_safe(case.net), differentiable(case.net, layers):
        found = rounding_energies(case.net, layers, target, errors, profile)

    dense = nets.Dense(case.net, [layer.name for layer in layers])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    matrix = dense.hessian(loss)
    values, vectors = torch.linalg.eigh(matrix)
    lead = values.abs().argsort(descending=True)[:k]
    start = 0
    for layer, size in zip(layers, dense.sizes, strict=True):
        delta = torch.zeros_like(dense.vector)
        delta[start : start + size] = errors[layer.name].flatten()
        start += size
        short = 0.5 * float((values[lead].abs() * (vectors[:, lead].T @ delta).square()).sum())
        assert found[layer.name].short == pytest.approx(short, rel=1e-2)
        if objective == "distill":
            assert found[layer.name].short + found[layer.name].rest == pytest.approx(
                0.5 * float(delta @ matrix @ delta), rel=1e-3
            )
        # The profile, whose errors these are, says the same.
        row = profile[layer.name]
        assert found[layer.name].short == pytest.approx(0.5 * row.subspace_energy[3], rel=1e-2)
        assert found[layer.name].rest == pytest.approx(
            0.5 * (row.second_order[3] - row.subspace_energy[3]), rel=5e-2, abs=1e-4
        )


def test_rows_that_are_drawn_are_those_of_the_profile(monkeypatch) -> None:
    drawn = functools.partial(gram_spectrum, max_rows=6)
    monkeypatch.setattr("lightning_caq.measures.hessian.subspace.gram_spectrum", drawn)
    monkeypatch.setattr("lightning_caq.evaluation.shares.gram_spectrum", drawn)
    case = nets.make_case("mlp")
    layers = find_layers(case.net, case.batches[0])
    needs = frozenset({"subspace"})
    profile = measure(case.net, case.batches, needs=needs, bits=(3,), samples=8, eigenpairs=3, seed=5)
    errors = {layer.name: nearest_errors(case.net, layer, [3])[3] for layer in layers}
    with curvature_safe(case.net), differentiable(case.net, layers):
        target = make_objective("distill", case.net, case.batches)
        found = rounding_energies(case.net, layers, target, errors, profile)
    for row in profile.layers:
        assert found[row.name].short == pytest.approx(0.5 * row.subspace_energy[3], rel=1e-3)


def test_no_eigenvalues_no_energies() -> None:
    assert rounding_energies(torch.nn.Linear(2, 2), [], None, {}, CurvatureProfile(())) == {}
