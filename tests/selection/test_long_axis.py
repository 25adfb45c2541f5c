"""Long-axis rounding of a trained network, alone and in whole runs."""

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every

from lightning_caq import pipeline, quantize
from lightning_caq.errors import OptionError
from lightning_caq.measures.hessian import eigenvectors
from lightning_caq.network.layers import find_layers, layer_weight
from lightning_caq.network.objective import make_objective
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.rounding.long_axis import round_long_axis
from lightning_caq.selection import long_axis
from lightning_caq.selection.long_axis import prepare_long_axis

X, Y = nets.images(96, 1)
OPTIONS = {"calibration_samples": 96, "curvature_samples": 48, "guard": False, "compare": (), "rounding": "long_axis"}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return nets.trained(nets.small_cnn(), *nets.images(256, 0), steps=80).eval()


def _loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


class Rounded:
    """All layers of a copy rounded, by one number of bits."""

    def __init__(self, trained, objective, bits, k=16):
        self.net, self.batches = copy.deepcopy(trained), [(X[:48], Y[:48])]
        self.layers = find_layers(self.net, self.batches[0])
        self.target = make_objective(objective, self.net, self.batches, _loss)
        self.floats = [layer_weight(self.net, x).detach().clone() for x in self.layers]
        self.grids = [fit_grid(w, bits, x.channel_shape) for w, x in zip(self.floats, self.layers, strict=True)]
        self.rounding = prepare_long_axis(self.net, self.layers, self.target, eigenpairs=k, seed=0)
        self.codes = self.rounding.codes(self.net, self.layers, self.grids)

    def loss(self, values):
        with torch.no_grad():
            for layer, value in zip(self.layers, values, strict=True):
                layer_weight(self.net, layer).copy_(value)
        return self.target.value(self.net)

    def of(self, codes):
        return [grid.values(c) for grid, c in zip(self.grids, codes, strict=True)]

    def delta(self, values):
        return torch.cat([(v - w).flatten() for v, w in zip(values, self.floats, strict=True)])

    @property
    def nearest(self):
        return [grid.nearest(w) for grid, w in zip(self.grids, self.floats, strict=True)]


@every("bits", [3, 4])
def test_steep_energy_and_divergence_are_far_below_those_of_nearest(trained, bits):
    done = Rounded(trained, "distill", bits, k=8)
    near, chosen = done.nearest, done.of(done.codes)
    for layer, value in zip(done.layers, done.floats, strict=True):
        assert torch.equal(layer_weight(done.net, layer), value)  # the network is left as it was
    shape = done.rounding.shape
    assert shape.steep_energy(done.delta(chosen)) < 0.02 * shape.steep_energy(done.delta(near))
    assert float(done.delta(chosen).square().sum()) < 1.15 * float(done.delta(near).square().sum())
    assert done.loss(chosen) < 0.5 * done.loss(near)


def test_task_follows_the_slope_where_the_model_holds(trained):
    done = Rounded(trained, "task", 6)
    before, after, near = (done.loss(v) for v in (done.floats, done.of(done.codes), done.nearest))
    assert after < before < near
    predicted = done.rounding.shape.change(done.delta(done.of(done.codes)))
    assert after - before == pytest.approx(predicted, rel=0.5, abs=1e-3)


def test_task_promises_nothing_where_the_model_fails(trained, monkeypatch):
    monkeypatch.setattr(long_axis, "is_predicted", lambda actual, predicted: False)
    done = Rounded(trained, "task", 3)
    plain = round_long_axis(done.floats, done.grids, done.rounding.shape.convex())
    assert all(torch.equal(a, b) for a, b in zip(done.codes, plain, strict=True))
    shape = done.rounding.shape
    assert shape.steep_energy(done.delta(done.of(plain))) < 0.1 * shape.steep_energy(done.delta(done.nearest))


@pytest.mark.parametrize("granularity", ["layer", "channel_group"])
def test_a_run_measures_once_for_every_candidate(trained, granularity, monkeypatch):
    times = []
    measured = pipeline.prepare_long_axis
    monkeypatch.setattr(
        pipeline, "prepare_long_axis", lambda *args, **kwargs: times.append(1) or measured(*args, **kwargs)
    )
    options = {**OPTIONS, "compare": ("uniform",), "granularity": granularity}
    done = quantize(copy.deepcopy(trained), [X], avg_bits=2.6, **options)
    assert len(times) == 1
    assert done.plan.rounding == "long_axis"
    assert done.plan.avg_bits <= 2.6
    near = quantize(copy.deepcopy(trained), [X], avg_bits=2.6, **{**options, "rounding": "nearest"})
    assert near.plan.widths == done.plan.widths
    assert all(torch.equal(a.grid.scale, b.grid.scale) for a, b in zip(near.plan.layers, done.plan.layers, strict=True))
    for variant in ("quantized", "uniform"):
        assert done.report.metrics[f"{variant}/distill"] < near.report.metrics[f"{variant}/distill"]


def test_a_run_with_task_is_repeatable(trained):
    found = [
        quantize(copy.deepcopy(trained), [(X, Y)], avg_bits=4, objective="task", loss_fn=_loss, eigenpairs=8, **OPTIONS)
        for _ in range(2)
    ]
    first, second = (x.plan for x in found)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first.layers, second.layers, strict=True))


def test_too_many_eigenvectors_are_refused_before_any_work(trained, monkeypatch):
    monkeypatch.setattr(eigenvectors, "LARGEST", 4 * 10 * sum(p.numel() for p in trained.parameters()))
    with pytest.raises(OptionError, match=r"eigenpairs=64 holds .* or fewer"):
        quantize(copy.deepcopy(trained), [X], avg_bits=3, **OPTIONS)
