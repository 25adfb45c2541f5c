"""Costs of groups of channels against dense float64 Gauss–Newton matrices and against the network itself."""

import dataclasses
import json
from itertools import pairwise

import nets
import pytest
import torch
from every import every

from lightning_caq.measures.gram.spectrum import gram_spectrum
from lightning_caq.measures.hessian import channel_split
from lightning_caq.measures.hessian.channel_split import group_channels, row_owners
from lightning_caq.measures.measure import differentiable, measure
from lightning_caq.measures.rounding.rounding_errors import nearest_errors
from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.profile import CurvatureProfile, LayerCurvature

NEEDS = frozenset({"rounding_error", "subspace", "loss_change", "diagonal", "channel_groups"})
BITS = (2, 4)


@pytest.fixture
def small(monkeypatch):
    """Groups of one channel and more, so that tiny layers have some."""
    monkeypatch.setattr(channel_split, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(channel_split, "MOST_GROUPS", 3)


def _blocks(case, layers):
    """Dense H_ii by layer name."""
    dense = nets.Dense(case.net, [layer.name for layer in layers])
    return dict(zip([x.name for x in layers], dense.blocks(nets.gauss_newton(case, dense)), strict=True))


def _at(layer, delta, channels):
    """The error at some channels, zeros elsewhere."""
    axis, only = 1 if layer.transposed else 0, torch.zeros_like(delta)
    return only.index_copy(axis, torch.tensor(channels), delta.index_select(axis, torch.tensor(channels)))


@every("name", nets.CASES)
def test_parts_of_the_quadratic_form_and_their_cross_terms(name):
    """Δ_gᵀ H Δ_h for every pair of groups; the sum over pairs is that of the whole layer."""
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    blocks = _blocks(case, layers)
    deltas = {x.name: {3: torch.randn(x.shape, dtype=torch.float64)} for x in layers}
    groups = {x.name: [tuple(range(c, x.channels, 2)) for c in range(min(x.channels, 2))] for x in layers}
    owners = {x.name: row_owners(x, groups[x.name]) for x in layers}
    for memory, exact in ((2**29, False), (2_000, True), (2_000, False)):  # in one piece, cut along outputs, folded
        with differentiable(case.net, layers):
            spectrum = gram_spectrum(
                case.net, layers, case.batches, deltas, k=4, owners=owners, tolerance=0.0, memory=memory, exact=exact
            )
        for layer in layers:
            parts, h = spectrum.parts[layer.name][3], blocks[layer.name]
            masked = torch.stack([_at(layer, deltas[layer.name][3], g).flatten() for g in groups[layer.name]])
            wanted = masked @ h @ masked.T
            torch.testing.assert_close(parts.T @ parts, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            torch.testing.assert_close(parts.sum(1), spectrum.projected[layer.name][3])


@every("name", ["mlp", "cnn", "pixels", "tied", "twice"])
def test_measured_costs_of_groups(name, small):
    case = nets.make_case(name)
    layers = find_layers(case.net, case.batches[0])
    blocks = _blocks(case, layers)
    profile = measure(case.net, case.batches, layers=layers, needs=NEEDS, bits=BITS, eigenpairs=400)
    for layer in layers:
        row, h, errors = profile[layer.name], blocks[layer.name], nearest_errors(case.net, layer, BITS)
        assert sorted(c for group in row.groups for c in group.channels) == list(range(layer.channels))
        assert len(row.groups) == min(3, layer.channels)
        for group in row.groups:
            found = group.row
            assert (found.channels, found.weights * layer.channels) == (
                len(group.channels),
                layer.weights * len(group.channels),
            )
            for b in BITS:
                delta = _at(layer, errors[b], group.channels).flatten().double()
                assert found.rounding_error[b] == pytest.approx(float(delta @ delta), rel=1e-5)
                wanted = float(delta @ h @ delta)
                assert found.second_order[b] == pytest.approx(wanted, rel=1e-3, abs=1e-6 * float(h.abs().max()))
                assert found.diagonal_energy[b] == pytest.approx(float(h.diagonal() @ delta**2), rel=1e-2)
            own = _at(layer, torch.ones(layer.shape, dtype=torch.float64), group.channels).flatten()
            assert found.trace == pytest.approx(float(h.diagonal() @ own), rel=1e-2, abs=1e-6 * float(h.trace()))
            # All eigenpairs are in S here: its curvature in a group is the group's trace.
            assert found.subspace_curvature == pytest.approx(found.trace, rel=1e-3)
        assert sum(x.row.subspace_curvature for x in row.groups) == pytest.approx(row.subspace_curvature)


def test_measured_changes_are_those_with_only_the_group_rounded(small):
    case = nets.make_case("mlp")
    layer = find_layers(case.net, case.batches[0])[0]
    profile = measure(case.net, case.batches, needs=NEEDS, bits=(1, 4))
    loss, weight = nets.distill_loss(case), layer_weight(case.net, layer)
    error = nearest_errors(case.net, layer, (1,))[1]
    for group in profile[layer.name].groups:
        with torch.no_grad():
            weight.add_(_at(layer, error, group.channels))
            wanted = float(loss(case.net))
            weight.sub_(_at(layer, error, group.channels))
        assert group.row.loss_change[1] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_a_task_loss_has_groups_too(small):
    case = nets.make_case("mlp")
    profile = measure(
        case.net, case.batches, objective="task", loss_fn=lambda net, batch: net(batch).logsumexp(1).mean(), needs=NEEDS
    )
    row = profile.layers[0]
    assert len(row.groups) == 3
    assert all(set(group.row.second_order) == {2, 3, 4, 5, 6, 8} for group in row.groups)
    for b in (2, 8):
        assert sum(group.row.first_order[b] for group in row.groups) == pytest.approx(row.first_order[b], rel=1e-5)


def test_groups_are_cut_from_channels_sorted_by_sensitivity():
    sensitivity = torch.rand(70, generator=torch.Generator().manual_seed(0))
    groups = group_channels(sensitivity)
    assert len(groups) == 16
    assert {len(g) for g in groups} == {4, 5}
    ends = [(float(sensitivity[list(g)].min()), float(sensitivity[list(g)].max())) for g in groups]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert [len(group_channels(torch.zeros(n))) for n in (1, 7, 8, 63, 64, 1000)] == [1, 1, 2, 15, 16, 16]


def test_a_layer_of_one_group_is_itself():
    case = nets.make_case("mlp")
    profile = measure(case.net, case.batches, needs=NEEDS, bits=BITS)
    for row in profile.layers:
        (group,) = row.groups
        assert group.channels == tuple(range(row.channels))
        assert group.row == dataclasses.replace(row, groups=())
    assert profile.by_group().layers == tuple(dataclasses.replace(row, groups=()) for row in profile.layers)


def test_profiles_with_groups_survive_json_and_older_ones_load(small):
    case = nets.make_case("mlp")
    profile = measure(case.net, case.batches, needs=NEEDS, bits=BITS)
    assert CurvatureProfile.from_json(profile.to_json()) == profile
    data = json.loads(CurvatureProfile((LayerCurvature("fc", 8, 2, 8),)).to_json())
    del data["layers"][0]["groups"]
    assert CurvatureProfile.from_json(json.dumps(data)).layers[0].groups == ()


def test_nothing_of_groups_is_measured_unless_asked():
    case = nets.make_case("mlp")
    assert all(row.groups == () for row in measure(case.net, case.batches, needs=NEEDS - {"channel_groups"}).layers)


def test_predicted_losses_of_mixed_layers_are_sums_over_groups(small):
    case = nets.make_case("mlp")
    profile = measure(case.net, case.batches, needs=NEEDS, bits=BITS)
    name, row = profile.layers[0].name, profile.layers[0]
    width = [0] * row.channels
    for i, group in enumerate(row.groups):
        for c in group.channels:
            width[c] = BITS[i % 2]
    parts = CurvatureProfile(tuple(group.row for group in row.groups))
    wanted = sum(parts.predicted_change(group.row.name, BITS[i % 2]) for i, group in enumerate(row.groups))
    assert profile.predicted_change(name, tuple(width)) == pytest.approx(wanted)
    plain = CurvatureProfile((dataclasses.replace(row, groups=()),))
    assert plain.predicted_loss({name: tuple(width)}) is None
