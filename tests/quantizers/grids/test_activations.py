"""Grids of inputs against numpy, brute force and what a plain network gives for inputs rounded by hand."""

import copy
import math
import pickle

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.quantizers.fake_quant.modules import fake_quant_class, quantized_weight
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules, swap
from lightning_caq.quantizers.grids.activations import InputGrid, fit_input_grid
from lightning_caq.quantizers.grids.affine import Grid

SAMPLES = {
    "relu": lambda: torch.randn(4000).relu(),
    "normal": lambda: torch.randn(4000),
    "skewed": lambda: torch.nn.functional.gelu(2 * torch.randn(4000)),
    "outliers": lambda: torch.cat([torch.randn(4000).relu(), torch.tensor([60.0])]),
    "negative": lambda: -torch.rand(4000),
}


def _error(values, scale, zero, bits):
    """Mean squared error of rounding, in numpy."""
    codes = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
    return float(np.mean((scale * (codes - zero) - values) ** 2))


@every("bits", [2, 3, 4, 8])
@every("name", SAMPLES)
def test_no_other_range_is_much_better(name, bits):
    values = SAMPLES[name]()
    grid, x = fit_input_grid(values, bits), values.double().numpy()
    top = 2**bits - 1
    zeros = range(top + 1) if bits < 8 else [grid.zero_point]
    full = (max(x.max(), 0) - min(x.min(), 0)) / top
    best = min(_error(x, full * f, z, bits) for z in zeros for f in np.geomspace(0.01, 1.05, 120))
    assert _error(x, grid.scale, grid.zero_point, bits) <= 1.06 * best
    assert grid.zero_point == 0 or x.min() < 0
    assert np.float32(grid.scale) == grid.scale


def test_rounds_as_numpy_does():
    grid = InputGrid(4, float(np.float32(0.1)), 5)
    x = np.concatenate([np.random.default_rng(0).normal(0, 1, 1000), [0.0, -9, 9]]).astype(np.float32)
    codes = np.clip(np.rint(x / np.float32(grid.scale)), -5, 10).astype(np.float32)
    assert np.array_equal(grid.nearest(torch.from_numpy(x)).numpy(), codes * np.float32(grid.scale))
    assert grid.nearest(torch.zeros(1)) == 0


@every("values", [torch.zeros(5), torch.full((5,), 3.0), torch.full((5,), -2.0), torch.tensor([1e-38])])
def test_inputs_that_are_constant(values):
    grid = fit_input_grid(values, 4)
    torch.testing.assert_close(grid.nearest(values), values, rtol=1e-5, atol=1e-29)


@every(
    "numbers", [(0, 1.0, 0), (9, 1.0, 0), (4, 0.0, 0), (4, math.nan, 0), (4, math.inf, 0), (4, 1.0, 16), (4, 1.0, -1),
                (4.0, 1.0, 0), (True, 1.0, 0), (4, 1.0, 0.5)],
)  # fmt: skip
def test_what_is_no_grid(numbers):
    with pytest.raises(OptionError, match=r"InputGrid\(.*\) is no grid: bits go from 1 to 8"):
        InputGrid(*numbers)


@every("dtype", [torch.float64, torch.bfloat16])
def test_rounding_keeps_the_type_and_passes_gradients(dtype):
    grid, x = InputGrid(3, 0.5, 0), torch.tensor([0.3, 9.0], dtype=dtype, requires_grad=True)
    y = grid.round(x)
    assert y.dtype == dtype
    assert y.tolist() == [0.5, 3.5]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]
    tokens = torch.tensor([3, 7])
    assert grid.round(tokens) is tokens


class Doubled(nn.Linear):
    """A forward of the user's own, its argument named otherwise."""

    def forward(self, values):
        return 2 * nn.functional.linear(values, self.weight, self.bias)


GRID = InputGrid(3, 0.25, 3)
MODULES = {**nets.CONVOLUTIONS, "linear": (lambda: nn.Linear(5, 3), (5,)), "own": (lambda: Doubled(5, 3), (5,))}


def _fine(module):
    """A grid so fine that weights hardly change."""
    return Grid(8, torch.full([1] * module.weight.ndim, 2.0**-6), torch.full([1] * module.weight.ndim, 128.0))


@every("name", MODULES)
def test_swapped_modules_round_their_input(name):
    make, shape = MODULES[name]
    net = nn.Sequential(make())
    with torch.no_grad():
        net[0].weight.copy_(_fine(net[0]).nearest(net[0].weight))
    plain, x = copy.deepcopy(net), torch.randn(3, *shape)
    rounded = torch.from_numpy(np.clip(np.rint(x.numpy() / 0.25), -3, 4) * np.float32(0.25))
    swap(net, {"0": _fine(net[0])}, {"0": GRID})
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(rounded))
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), net(x))
        exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), plain(rounded))
    x.requires_grad_()
    net(x).square().sum().backward()
    again = rounded.clone().requires_grad_()
    plain(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)  # straight through the rounding


def test_an_own_forward_keeps_its_signature_and_takes_keywords():
    net = Doubled(5, 3)
    plain, x = copy.deepcopy(net), torch.randn(2, 5)
    swap(net, {"": _fine(net)}, {"": GRID})
    net.load_state_dict(net.state_dict() | {"weight": quantized_weight(net).detach()})
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(values=x), plain(GRID.nearest(x)))
    assert "values" in __import__("inspect").signature(fake_quant_class(Doubled).forward).parameters


def test_float_weights_run_with_float_inputs():
    net = nn.Sequential(nn.Linear(5, 3))
    source = copy.deepcopy(net)
    swap(net, {"0": Grid(2, torch.ones(3, 1), torch.ones(3, 1))}, {"0": GRID})
    with pytest.warns(UserWarning, match="run as the float layers they are"):
        net.load_state_dict(source.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(net(x), source(x))


def test_swapping_and_restoring():
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    attributes = [sorted(m.__dict__) for m in net.modules()]
    grids = {name: _fine(net.get_submodule(name)) for name in "01"}
    swap(net, grids, {"1": GRID})
    assert [rounding_state(m).input_grid for m in quantized_modules(net).values()] == [None, GRID]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    swap(net, grids)
    assert [rounding_state(m).input_grid for m in quantized_modules(net).values()] == [None, None]
    restore_modules(net)
    assert [sorted(m.__dict__) for m in net.modules()] == attributes
