"""The whole profile: figures against dense references, and a network that is left as it was."""

import copy

import nets
import pytest
import torch
from every import every
from scipy import stats
from torch import nn

from lightning_caq.errors import CalibrationError, OptionError
from lightning_caq.measures.hessian import subspace
from lightning_caq.measures.hessian.validity import is_predicted
from lightning_caq.measures.measure import measure
from lightning_caq.measures.registry import available_measures
from lightning_caq.network.forward import run_model
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective
from lightning_caq.profile import CurvatureProfile
from lightning_caq.utilities.progress import Progress

MEASURES = available_measures()


def _measure(case, **kwargs):
    layers = find_layers(case.net, case.batches[0])
    return measure(case.net, case.batches, layers=layers, **{"bits": (2, 4, 8), "eigenpairs": 5, **kwargs})


def _rounded(case, row, bits):
    """The error of nearest rounding, by way of the layer's public function."""
    from lightning_caq.measures.rounding.rounding_errors import nearest_errors

    layer = next(x for x in find_layers(case.net, case.batches[0]) if x.name == row.name)
    return nearest_errors(case.net, layer, [bits])[bits].flatten()


def _task(net, batch):
    return nets.task_loss(run_model(net, batch).values)


def _check_against(profile, case, dense, matrix):
    """Eigenvalues, μ and the energies of rounding errors in the short-axis subspace."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)[:5]
    values, vectors = values[order], vectors[:, order]
    assert list(profile.eigenvalues) == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4 * float(values[0].abs()))
    n, start = len(matrix), 0
    for row, size in zip(profile.layers, dense.sizes, strict=True):
        part = vectors[start : start + size]
        assert row.subspace_curvature == pytest.approx(float(values.abs() @ part.square().sum(0)), rel=1e-2)
        for bits in (2, 4):
            delta = _rounded(case, row, bits)
            assert row.rounding_error[bits] == pytest.approx(float(delta.square().sum()), rel=1e-6)
            energy = float(values.abs() @ (part.T @ delta).square())
            assert row.subspace_energy[bits] == pytest.approx(energy, rel=2e-2, abs=1e-7)
        start += size
        for bits in (2, 4):
            delta = torch.zeros(len(matrix), dtype=matrix.dtype)
            delta[start - size : start] = _rounded(case, row, bits)
            exact = float(delta @ matrix @ delta)
            along = float(values @ (vectors.T @ delta).square()) + profile.residual_curvature * float(delta @ delta)
            known = exact if profile.objective == "distill" else along
            assert row.second_order[bits] == pytest.approx(known, rel=2e-2, abs=1e-6)
    outside = max(profile.trace - sum(profile.eigenvalues), 0) / (n - 5)
    assert profile.residual_curvature == pytest.approx(outside, rel=1e-9)


@every("name", ["mlp", "cnn", "tied", "frozen_inplace", "dict"])
def test_distill_against_the_dense_hessian(name):
    case = nets.make_case(name)
    profile = _measure(case, needs=nets.DISTILL_NEEDS)
    dense = nets.Dense(case.net, [row.name for row in profile.layers])
    matrix = nets.gauss_newton(case, dense)
    _check_against(profile, case, dense, matrix)
    assert profile.shape == "ellipsoid"
    assert profile.trace == pytest.approx(float(matrix.trace()), rel=1e-3)
    for row, block in zip(profile.layers, dense.blocks(matrix), strict=True):
        assert row.trace == pytest.approx(float(block.trace()), rel=1e-3)


def test_task_against_the_dense_hessian():
    case = nets.make_case("mlp")
    profile = _measure(case, objective="task", loss_fn=_task, needs=nets.DISTILL_NEEDS)
    dense = nets.Dense(case.net, ["0", "2"])
    matrix = dense.hessian(lambda net: nets.loss_of(case, net))
    _check_against(profile, case, dense, matrix)
    assert profile.shape == "hyperbolic paraboloid"
    slope = torch.func.grad(lambda v: nets.loss_of(case, dense.call(v)))(dense.vector).detach().split(dense.sizes)
    for row, part, block in zip(profile.layers, slope, dense.blocks(matrix), strict=True):
        assert abs(row.trace - float(block.trace())) < 5 * row.trace_stderr
        for bits in (2, 4):
            assert row.first_order[bits] == pytest.approx(float(part @ _rounded(case, row, bits)), rel=1e-6)


@every("objective", ["distill", "task"])
def test_validity_walks_up_to_the_bits_at_which_the_model_holds(objective):
    """``outside`` says where the quadratic prediction is off by more than half; there the measured change counts."""
    case = nets.make_case("mlp")
    with torch.no_grad():
        for parameter in case.net.parameters():
            parameter.mul_(8)
    profile = _measure(case, objective=objective, loss_fn=_task, needs=nets.DISTILL_NEEDS, bits=(1, 2, 3, 8))
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    dense = nets.Dense(case.net, ["0", "2"])
    reference = float(loss(dense.call(dense.vector)).detach())
    start, checked = 0, set()
    for row, size in zip(profile.layers, dense.sizes, strict=True):
        for bits, change in row.loss_change.items():
            moved = dense.vector.clone()
            moved[start : start + size] += _rounded(case, row, bits)
            actual = float(loss(dense.call(moved)).detach()) - reference
            assert change == pytest.approx(actual, rel=1e-5, abs=1e-8)
            good = is_predicted(actual, row.first_order[bits] + 0.5 * row.second_order[bits])
            assert good == (bits not in row.outside)
            checked.add(good)
        # The walk ends at the first bit-width at which the model holds.
        assert tuple(row.loss_change)[: len(row.outside)] == row.outside
        assert len(row.loss_change) in (len(row.outside), len(row.outside) + 1)
        start += size
    assert checked == {True, False}  # both kinds were seen


def test_the_model_predicts_small_changes():
    """At 8 bits the quadratic model is nearly exact for the whole network."""
    case = nets.make_case("cnn")
    profile = _measure(case, needs=nets.DISTILL_NEEDS, eigenpairs=1000)
    layers = find_layers(case.net, case.batches[0])
    objective = make_objective("distill", case.net, case.batches)
    for row, layer in zip(profile.layers, layers, strict=True):
        weight = case.net.get_submodule(layer.name).weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(_rounded(case, row, 8).reshape(layer.shape))
            actual = objective.value(case.net)
            weight.copy_(before)
        assert profile.predicted_change(row.name, 8) == pytest.approx(actual, rel=0.1)


@every("objective", ["distill", "task"])
def test_leaves_the_network_as_it_was(objective):
    net = nets.trained(nets.small_cnn(), *nets.images(64, 0), steps=2)
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    x, y = nets.images(24, 1)
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    layers = find_layers(net.eval(), x)
    net.train()
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    measure(net, [(x, y)], layers=layers, objective=objective, loss_fn=loss, needs=MEASURES, bits=(2, 8), eigenpairs=4)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * (len(list(net.parameters())) - 1)
    assert torch.equal(net[4].weight.grad, torch.ones_like(net[4].weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "4.weight")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_is_the_same_every_time_and_depends_on_the_seed():
    case = nets.make_case("mlp")
    kwargs = {"needs": MEASURES, "objective": "task", "loss_fn": _task}
    first, other = _measure(case, **kwargs), _measure(case, **kwargs, seed=1)
    torch.rand(3)
    again = _measure(case, **kwargs)
    assert first.layers == again.layers
    assert first.eigenvalues == again.eigenvalues
    assert [r.trace for r in first.layers] != [r.trace for r in other.layers]


def test_samples_are_the_first_of_the_batches():
    case = nets.make_case("mlp")
    few = _measure(case, needs=nets.DISTILL_NEEDS, samples=6)
    cut = nets.Case(case.net, [case.batches[0], case.batches[1][:1]])
    assert few.samples == 6
    assert few.eigenvalues == _measure(cut, needs=nets.DISTILL_NEEDS).eigenvalues


@every("need", sorted(MEASURES))
def test_each_measure_can_be_asked_for_alone(need):
    case = nets.make_case("mlp")
    profile = _measure(case, needs=frozenset({need}))
    row = profile if need == "density" else profile.layers[0]
    named = {"inputs": "input_norm", "subspace": "subspace_energy", "diagonal": "diagonal_energy"}
    given = {**named, "channel_groups": "groups"}.get(need, need)
    assert getattr(row, given)


def test_a_layer_that_no_batch_reaches_has_zeros():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    net.forward = lambda x: net["used"](x)
    x = torch.randn(4, 3)
    row = measure(net, [x], needs=MEASURES, bits=(2, 4))["idle"]
    assert (row.kappa, row.lipschitz, row.trace, row.amplification, row.input_norm) == (0, 0, 0, 0, 0)
    assert set(row.output_error.values()) == {0.0}
    assert row.rounding_error[2] > 0


def test_attention_has_all_measures():
    """The fast kernels have neither second nor forward derivatives."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(nn.functional.scaled_dot_product_attention(*self.mix(x).chunk(3, -1)))

    net, x = Attention().double(), torch.randn(3, 4, 4, dtype=torch.float64)
    case = nets.Case(net, [x])
    needs = MEASURES - {"lipschitz_amplification"}  # attention has no Lipschitz constant
    for objective in ("distill", "task"):
        profile = _measure(case, objective=objective, loss_fn=_task, needs=needs, eigenpairs=3)
        dense = nets.Dense(net, ["mix", "out"])
        loss = nets.distill_loss(case) if objective == "distill" else lambda f: nets.task_loss(f(x))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            values = torch.linalg.eigvalsh(dense.hessian(loss))
        top = values[values.abs().argsort(descending=True)][:3]
        assert list(profile.eigenvalues) == pytest.approx(top.tolist(), rel=2e-3)


def test_bad_input():
    case = nets.make_case("mlp")
    with pytest.raises(OptionError, match=r"'curl' is not a known measure.*'kappa'"):
        _measure(case, needs=frozenset({"curl"}))
    with pytest.raises(OptionError, match="objective='task' needs loss_fn"):
        _measure(case, objective="task")
    with pytest.raises(CalibrationError, match="batch 1 is nan"):
        _measure(
            case,
            objective="task",
            needs=nets.DISTILL_NEEDS,
            loss_fn=lambda m, b: m(b).mean() * (1 if len(b) == 5 else float("nan")),
        )
    with pytest.raises(CalibrationError, match=r"must be a scalar.*\[5, 3\]"):
        _measure(case, objective="task", loss_fn=lambda m, b: m(b), needs=nets.DISTILL_NEEDS)


@every("objective", ["distill", "task"])
def test_sensitivities_of_the_baselines_against_the_dense_matrix(objective):
    case = nets.make_case("mlp")
    needs = frozenset(
        {"diagonal", "top_eigenvalue", "gradient_norm", "local_lipschitz", "lipschitz", "kappa_mean", "kappa"}
    )
    profile = _measure(case, objective=objective, loss_fn=_task, needs=needs)
    dense = nets.Dense(case.net, [row.name for row in profile.layers])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    matrix = torch.func.hessian(lambda w: loss(dense.call(w)))(dense.vector).detach()
    slope = torch.func.grad(lambda w: loss(dense.call(w)))(dense.vector).detach()
    start = 0
    for row, size in zip(profile.layers, dense.sizes, strict=True):
        part = slice(start, start + size)
        values = torch.linalg.eigvalsh(matrix[part, part])
        top = float(values[values.abs().argmax()])
        assert row.top_eigenvalue == pytest.approx(top, abs=2 * row.top_eigenvalue_residual + 1e-3 * abs(top))
        assert row.gradient_norm == pytest.approx(float(slope[part].norm()), rel=1e-4, abs=1e-6)
        if objective == "distill":
            delta = _rounded(case, row, 2)
            energy = float(matrix.diagonal()[part] @ delta.square())
            assert row.diagonal_energy[2] == pytest.approx(energy, rel=1e-2)
        assert 0 < row.local_lipschitz <= row.lipschitz * (1 + 1e-3)
        assert 0 < row.kappa_mean <= row.kappa * (1 + 1e-3)
        start += size


def test_a_time_budget_means_fewer_samples(capsys):
    case = nets.make_case("mlp")
    batches = [torch.cat([batch] * 40) for batch in case.batches[:1]]
    lines = []
    kwargs = {"needs": nets.DISTILL_NEEDS, "bits": (2, 4), "eigenpairs": 5, "progress": Progress(lines.append)}
    whole = measure(case.net, batches, **kwargs)
    part = measure(case.net, batches, time_budget=1e-9, **kwargs)
    assert (whole.samples, part.samples) == (len(batches[0]), 1)
    assert any("about" in line for line in lines)
    assert any("1 samples only" in line for line in lines)
    with pytest.raises(OptionError, match="time_budget=0"):
        measure(case.net, batches, time_budget=0)


@every("objective", ["distill", "task"])
def test_density_against_the_eigenvalues(objective):
    case = nets.make_case("mlp")
    profile = _measure(case, objective=objective, loss_fn=_task, needs=frozenset({"density"}))
    assert CurvatureProfile.from_json(profile.to_json()) == profile
    grid, heights, errors = (torch.tensor(x) for x in (*profile.density, profile.density_stderr))
    dense = nets.Dense(case.net, [row.name for row in profile.layers])
    loss = nets.distill_loss(case) if objective == "distill" else lambda net: nets.loss_of(case, net)
    values = torch.linalg.eigvalsh(dense.hessian(loss))
    assert float(torch.trapezoid(heights, grid)) == pytest.approx(1, abs=1e-3)
    assert float(grid[0]) < float(values[0]) < float(values[-1]) < float(grid[-1])
    if objective == "distill":  # every eigenvalue is known: the density is that of the dense matrix
        width = 0.01 * float(values[-1])
        bells = stats.norm.pdf(grid.numpy()[:, None], values.numpy(), width).mean(1)
        assert heights.numpy() == pytest.approx(bells, rel=1e-3, abs=1e-3 * bells.max())
        assert not errors.any()
        return
    # The mean of the density is tr(H)/n; four probes know it to a few standard errors of theirs.
    mean = float(torch.trapezoid(heights * grid, grid))
    spread = float(torch.trapezoid(errors * grid.abs(), grid))
    assert abs(mean - float(values.mean())) < 4 * spread


def test_density_is_estimated_where_rows_are_drawn():
    net, images = nn.Linear(3, 60), [torch.randn(64, 3)]  # 64 · 60 rows of outputs are more than are kept
    profile = measure(net, images, needs=frozenset({"density"}), bits=(4,))
    assert profile.sampled is not None
    assert any(profile.density_stderr)


def test_converged_says_which_pairs_are_within_the_tolerance():
    case = nets.make_case("mlp")
    assert _measure(case, needs=nets.DISTILL_NEEDS).converged == (True,) * 5
    task = _measure(case, needs=nets.DISTILL_NEEDS, objective="task", loss_fn=_task)
    assert task.converged == (True,) * 5
    values, residuals = (10.0, -1.0, 1e-9), (0.005, 0.5, 1e-8)
    assert CurvatureProfile((), eigenvalues=values, eigenvalue_residuals=residuals).converged == (True, False, True)


@pytest.mark.parametrize("max_rows", [None, 20])
def test_drawn_rows_are_said_to_be_drawn(max_rows, monkeypatch):
    """More rows than are computed: unbiased traces with a standard error, and a mark in the profile."""
    case = nets.make_case("mlp")
    if max_rows is not None:
        whole = subspace.gram_spectrum
        monkeypatch.setattr(subspace, "gram_spectrum", lambda *args, **kw: whole(*args, **kw, max_rows=max_rows))
    profile = _measure(case, needs=nets.DISTILL_NEEDS)
    assert profile.sampled == (None if max_rows is None else (20, 24))
    assert CurvatureProfile.from_json(profile.to_json()) == profile
    dense = nets.Dense(case.net, [row.name for row in profile.layers])
    for row, block in zip(profile.layers, dense.blocks(nets.gauss_newton(case, dense)), strict=True):
        assert (row.trace_stderr > 0) == (max_rows is not None)
        assert row.trace == pytest.approx(float(block.trace()), rel=1e-3, abs=4 * row.trace_stderr)
