import nets
import pytest
import torch
from torch import nn

from lightning_caq.quantizers.fake_quant.modules import FakeQuant
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules, restore_modules, swap
from lightning_caq.quantizers.grids.affine import fit_grid


def _grid(module, bits=3):
    shape = [1] * module.weight.ndim
    shape[0] = len(module.weight)
    return fit_grid(module.weight, bits, tuple(shape))


def test_modules_stay_the_same_objects():
    net = nets.small_cnn()
    modules, parameters, state = list(net.modules()), list(net.parameters()), net.state_dict()
    values = {k: v.clone() for k, v in state.items()}
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    swap(net, {"0": _grid(net[0])})
    assert all(a is b for a, b in zip(modules, net.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert net.state_dict().keys() == values.keys()
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())
    net.eval()(torch.randn(1, 1, 8, 8))
    assert seen == [1]
    assert isinstance(net[0], nn.Conv2d)
    assert isinstance(net[0], FakeQuant)
    assert (rounding_state(net[0]).bits, rounding_state(net[0]).quantizing) == (3, True)
    assert quantized_modules(net) == {"0": net[0]}


def test_restoring_leaves_no_trace():
    net = nets.small_cnn()
    attributes = [sorted(m.__dict__) for m in net.modules()]
    swap(net, {"0": _grid(net[0]), "10": _grid(net[10])})
    restore_modules(net)
    assert [type(net[i]) for i in (0, 10)] == [nn.Conv2d, nn.Linear]
    assert [sorted(m.__dict__) for m in net.modules()] == attributes
    assert not net[0]._buffers
    assert not net[0]._non_persistent_buffers_set
    assert quantized_modules(net) == {}


def test_swapping_again_changes_the_grid():
    net = nn.Sequential(nn.Linear(4, 3))
    swap(net, {"0": _grid(net[0], 2)})
    rounding_state(net[0]).quantizing = False
    swap(net, {"0": _grid(net[0], 5)})
    assert (rounding_state(net[0]).bits, rounding_state(net[0]).quantizing, type(net[0]).__name__) == (
        5,
        True,
        "FakeQuantLinear",
    )
    restore_modules(net)
    assert type(net[0]) is nn.Linear


def test_an_unknown_name_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(AttributeError):
        swap(net, {"0": _grid(net[0]), "1": _grid(net[0])})
    assert type(net[0]) is nn.Linear


def test_a_module_under_two_names():
    net = nets.Twice()
    grid = _grid(net.first)
    swap(net, {"first": grid, "second": grid})
    assert net.first is net.second
    assert type(net.first).__name__ == "FakeQuantLinear"
    restore_modules(net)
    assert type(net.second) is nn.Linear
