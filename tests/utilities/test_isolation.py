import random

import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq.quantizers.fake_quant.swap import swap
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.utilities.isolation import preserved


def _net():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    net.train()
    net[1].eval()  # a frozen batch-norm in a network that trains
    return net


def _picture(net):
    """Everything that can be seen of a network."""
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "parameters": {k: id(v) for k, v in net.named_parameters()},
        "buffers": {k: id(v) for k, v in net.named_buffers()},
        "unsaved": [set(m._non_persistent_buffers_set) for m in net.modules()],
        "classes": [type(m) for m in net.modules()],
        "flags": [m.training for m in net.modules()],
        "grads": [p.requires_grad for p in net.parameters()],
        "attributes": [sorted(m.__dict__) for m in net.modules()],
    }


def _same(before, after):
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def _wreck(net, error):
    """All that work on a network may do to it before it fails."""
    weight = net[0].weight.detach()
    swap(net, {"0": fit_grid(weight, 2, (4, 1))})
    with torch.no_grad():
        for tensor in net.state_dict(keep_vars=True).values():
            tensor.zero_()
    net[1].train()
    net[3].weight = nn.Parameter(torch.ones(2, 4))
    net[3].register_buffer("extra", torch.ones(1))
    net[3].note = "hello"
    net.add_module("more", nn.ReLU())
    torch.rand(5), np.random.rand(5), random.random()
    raise error


@every("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_everything_is_put_back_if_the_work_fails(error):
    net = _net()
    before = _picture(net)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(error), preserved(net):
        _wreck(net, error)
    _same(before, _picture(net))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_flags_and_random_states_are_put_back_in_any_case():
    net = _net()
    flags = [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    with preserved(net):
        assert not any(m.training for m in net.modules())
        torch.rand(5)
        nn.init.zeros_(net[0].weight)
    assert [m.training for m in net.modules()] == flags
    assert torch.equal(rng, torch.get_rng_state())
    assert not net[0].weight.any()  # what was done on purpose stays


def test_optimizers_go_on_with_the_same_parameters():
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError), preserved(net):
        _wreck(net, RuntimeError)
    before = net[3].weight.detach().clone()
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[3].weight, before)


def test_a_block_in_another_one_copies_nothing_and_failures_go_back_to_the_outer_beginning(monkeypatch):
    net, clones = _net(), []
    clone = torch.Tensor.clone
    before, again = _picture(net), _picture(net)

    def work():
        with preserved(net):
            nn.init.zeros_(net[0].weight)
            monkeypatch.setattr(torch.Tensor, "clone", lambda *x, **kw: clones.append(1) or clone(*x, **kw))
            with preserved(net):
                assert not clones
                monkeypatch.undo()
                _wreck(net, RuntimeError)

    for picture in (before, again):  # a later block copies again
        with pytest.raises(RuntimeError):
            work()
        _same(picture, _picture(net))


def test_a_block_for_another_network_copies_that_one():
    outer, inner = _net(), _net()
    before = _picture(inner)
    with preserved(outer):
        with pytest.raises(RuntimeError), preserved(inner):
            _wreck(inner, RuntimeError)
        _same(before, _picture(inner))
