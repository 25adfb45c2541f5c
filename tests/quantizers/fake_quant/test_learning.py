"""Learned scales against the papers' formulas, and what is left of them afterwards."""

import copy

import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import load_quantized, quantize, save_quantized
from lightning_caq.errors import LayerError
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.learned import lsq_round, pact_round, stretched
from lightning_caq.quantizers.fake_quant.learning import learning_scales
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.quantizers.grids.activations import InputGrid
from lightning_caq.quantizers.grids.affine import Grid, fit_grid

OPTIONS = {"method": "uniform", "avg_bits": 2, "bits": (2,), "compare": (), "guard": False}


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _data():
    draw = torch.Generator().manual_seed(1)
    return torch.randn(256, 6, generator=draw)


def test_lsq_values_and_gradients_are_the_papers():
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid = fit_grid(w, 2, (3, 1))
    factor = torch.tensor([[0.5], [1.0], [1.3]], requires_grad=True)
    out = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    rounded = lsq_round(w, grid, factor)
    assert torch.equal(rounded, stretched(grid, factor.detach()).nearest(w.detach()))
    (rounded * out).sum().backward()
    s, z = (grid.scale * factor.detach()).double().numpy(), grid.zero_point.double().numpy()
    place = w.detach().double().numpy() / s + z
    inside = (place >= 0) & (place <= 3)
    slope = np.where(inside, np.round(place) - place, np.clip(place, 0, 3) - z)
    expected = (slope * out.numpy()).sum(1, keepdims=True) * grid.scale.numpy() / np.sqrt(40 * 3)
    np.testing.assert_allclose(factor.grad, expected, rtol=1e-4)
    np.testing.assert_allclose(w.grad, np.where(inside, out, 0), rtol=1e-5)


def test_pact_values_and_gradients_are_the_papers():
    x = torch.linspace(-2, 6, 81, requires_grad=True)
    grid, factor = InputGrid(3, 0.5, 0), torch.tensor(0.9, requires_grad=True)
    rounded = pact_round(x, grid, factor)
    clip = 0.5 * 7 * 0.9
    expected = np.round(np.clip(x.detach().numpy(), 0, clip) * 7 / clip) * clip / 7
    np.testing.assert_allclose(rounded.detach(), expected, rtol=1e-5, atol=1e-6)
    rounded.sum().backward()
    values = x.detach().numpy()
    assert float(factor.grad) == pytest.approx((values >= clip).sum() * 3.5)
    np.testing.assert_allclose(x.grad, (values >= 0) & (values < clip))


def _trained(activation_bits, steps=60):
    """A network trained to follow another one, with learned scales."""
    net, x = _net(), _data()
    target = net(x).detach()
    plan = quantize(net, [x], activation_bits=activation_bits, rounding="nearest", batchnorm="keep", **OPTIONS).plan
    before = float((net(x) - target).square().mean().detach())
    keys = list(net.state_dict())
    with learning_scales(net):
        assert list(net.state_dict()) == keys
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            (net(x) - target).square().mean().backward()
            optimiser.step()
        settled = plan.settled(net)
        with torch.no_grad():
            inside = net(x)
    return net, x, target, plan, settled, before, inside


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_what_is_learned_ends_as_an_ordinary_plan(activation_bits, tmp_path):
    net, x, target, plan, settled, before, inside = _trained(activation_bits)
    assert torch.equal(net(x), inside)
    assert float((net(x) - target).square().mean().detach()) < before
    assert settled.bytes == plan.bytes
    for old, new in zip(plan.layers, settled.layers, strict=True):
        assert not torch.equal(old.grid.scale, new.grid.scale)
        assert torch.equal(old.grid.zero_point, new.grid.zero_point)
        assert torch.equal(rounding_state(net.get_submodule(new.name)).grid.scale, new.grid.scale)
        if activation_bits and new.input_grid.zero_point == 0:
            assert old.input_grid.scale != new.input_grid.scale
    assert len(list(net.parameters())) == 6
    fresh = _net()
    fresh.load_state_dict(net.state_dict())
    loaded = QuantizationPlan.load(settled.save(tmp_path / "plan"))
    assert loaded.attach(fresh)
    assert torch.equal(fresh(x), net(x))
    assert torch.equal(load_quantized(_net(), save_quantized(net, tmp_path / "net"))(x), net(x))


def test_scales_undo_themselves_if_training_fails():
    net, x = _net(), _data()
    quantize(net, [x], **OPTIONS)
    before = net(x)
    with pytest.raises(RuntimeError, match="stop"), learning_scales(net):
        raise RuntimeError("stop")
    assert torch.equal(net(x), before)
    assert all(rounding_state(module).scale_factor is None for module in quantized_modules(net).values())
    assert len(list(net.parameters())) == 6


def test_checkpoints_meanwhile_load():
    net, x = _net(), _data()
    quantize(net, [x], **OPTIONS)
    other = copy.deepcopy(net)
    with learning_scales(net):
        net.load_state_dict(other.state_dict())  # strict
        copy.deepcopy(net)(x)
    plain = _net()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(plain(x), net(x))


def test_tied_modules_learn_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 4)
    plan = quantize(net, [x], **OPTIONS).plan
    with learning_scales(net):
        assert rounding_state(net.one).scale_factor is rounding_state(net.two).scale_factor
        optimiser = torch.optim.SGD(net.parameters(), 0.5)
        net(x).square().mean().backward()
        optimiser.step()
        settled = plan.settled(net)
    assert torch.equal(rounding_state(net.one).grid.scale, rounding_state(net.two).grid.scale)
    assert torch.equal(rounding_state(net.one).grid.scale, settled.layers[0].grid.scale)


@every("quantizer", [None, "codebook"])
def test_networks_without_an_affine_grid_are_refused(quantizer):
    net = _net()
    if quantizer:
        quantize(net, [_data()], quantizer=quantizer, **OPTIONS)
    with pytest.raises(LayerError, match="no layer with an affine grid"), learning_scales(net):
        pass


def test_stretched_keeps_what_it_does_not_change():
    grid = Grid(4, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([[2], [4]], dtype=torch.uint8))
    found = stretched(grid, torch.tensor([[2.0], [0.0]]))
    assert found.scale.flatten().tolist() == pytest.approx([2.0, 1e-3])
    assert found.width == (2, 4)


def test_each_channel_has_the_step_of_its_own_bits():
    w, out = torch.randn(2, 40), torch.randn(2, 40)
    whole = [fit_grid(row[None], bits, (1, 1)) for row, bits in zip(w, (2, 6), strict=True)]
    joined = fit_grid(w, (2, 6), (2, 1))
    factors = [torch.ones(1, 1, requires_grad=True) for _ in whole]
    for row, o, grid, factor in zip(w, out, whole, factors, strict=True):
        (lsq_round(row[None], grid, factor) * o).sum().backward()
    factor = torch.ones(2, 1, requires_grad=True)
    (lsq_round(w, joined, factor) * out).sum().backward()
    torch.testing.assert_close(factor.grad, torch.cat([each.grad for each in factors]))
