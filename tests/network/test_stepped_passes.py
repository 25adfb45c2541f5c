"""Passes that wait, against passes that were begun anew for every layer."""

import threading

import pytest
import torch
from every import every
from torch import nn

from lightning_caq.network.stepped_passes import SteppedPasses


class Branches(nn.Module):
    """Two layers beside each other, one used twice, and a layer whose weight is given by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.left(x)) + self.right(input=x)
        return self.last(self.left(x))


def _waiting():
    """How many passes are under way; threads of others do not count."""
    return sum(thread.name == "caq-pass" for thread in threading.enumerate())


def _plainly(net, batches, module):
    """Inputs of every call of a module, from passes over the network as it is."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0] if args else kwargs["input"]), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            net(batch)
    handle.remove()
    return seen


@every("memory", [0, 4 * 4 * 5 * 4, 2**28])
@every("order", [["first", "left", "right", "last"], ["last", "right", "left", "first", "last"]])
def test_inputs_are_those_of_the_network_as_changed_so_far(order, memory):
    net, batches = Branches(), [torch.randn(5, 4), torch.randn(2, 4)]
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with SteppedPasses(net, net.children(), batches, memory=memory) as passes:
        found = {}
        for place, name in enumerate(order):
            module = getattr(net, name)
            found[place] = [
                call.inputs for calls in passes.calls([module], 2 if name == "left" else 1) for call in calls
            ]
            with torch.no_grad():
                module.weight.mul_(1.5)
    net.load_state_dict(own)
    for place, name in enumerate(order):
        module = getattr(net, name)
        expected = _plainly(net, batches, module)
        assert len(found[place]) == len(expected)
        assert all(torch.equal(x, y) for x, y in zip(found[place], expected, strict=True))
        with torch.no_grad():
            module.weight.mul_(1.5)


def test_what_follows_a_module_that_is_used_twice_sees_it_changed_in_both_places():
    twice, last, x = nn.Linear(3, 3), nn.Linear(3, 2), torch.randn(4, 3)
    net = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), last)
    with SteppedPasses(net, [twice, last], [x]) as passes, torch.no_grad():
        [calls] = passes.calls([twice], 2)
        assert len(calls) == 2
        twice.weight.mul_(1.5)
        [[call]] = passes.calls([last], 1)
        assert torch.equal(call.inputs, net[:4](x))


def test_layers_in_their_order_cost_one_pass():
    net, ran = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))), []
    for module in net:
        module.register_forward_hook(lambda *_: ran.append(1))
    with SteppedPasses(net, net, [torch.randn(2, 3)]) as passes:
        for module in net:
            list(passes.calls([module], 1))
    assert len(ran) == 5  # the last layer was never needed


def test_passes_that_take_too_much_room_are_not_kept():
    net, batches = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6))), [torch.randn(2, 3)] * 3
    with SteppedPasses(net, net, batches, memory=2 * 2 * batches[0].nbytes) as passes:
        for module in net:
            list(passes.calls([module], 1))
            assert _waiting() <= 2


def test_a_call_can_be_carried_out_without_going_on():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    with SteppedPasses(net, net, [x]) as passes, torch.no_grad():
        [[call]] = passes.calls([net[1]], 1)
        assert torch.equal(call.output(), net(x))  # calls of others run as ever


def test_a_pass_that_ends_early_gives_what_it_has():
    net = Branches()
    with SteppedPasses(net, net.children(), [torch.randn(2, 4)]) as passes:
        assert [len(calls) for calls in passes.calls([net.right], 3)] == [1]
        assert [len(calls) for calls in passes.calls([net.left], 2)] == [2]


@every("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_in_the_network_comes_out_and_nothing_stays(error):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert _waiting() == 0

    def fail(*_):
        raise error

    net[1].register_forward_hook(fail)
    with SteppedPasses(net, [net[0], net[2]], [torch.randn(2, 3)] * 3) as passes:
        list(passes.calls([net[0]], 1))
        assert _waiting() == 3
        with pytest.raises(type(error)):
            list(passes.calls([net[2]], 1))
    assert _waiting() == 0
    assert not net[0]._forward_pre_hooks


def test_gradients_are_off_and_two_sets_of_passes_do_not_meet():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    with SteppedPasses(net, net, [x]) as one, SteppedPasses(net, net, [x]) as two:
        [[first]], [[second]] = one.calls([net[1]], 1), two.calls([net[1]], 1)
    assert torch.equal(first.inputs, second.inputs)
    assert not first.inputs.requires_grad
