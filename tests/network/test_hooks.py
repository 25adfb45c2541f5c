import pytest
import torch
from every import every
from torch import nn

from lightning_caq.network.hooks import visit_modules


def _setup():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    return net, [torch.randn(4, 2), torch.randn(2, 2)]


def test_shows_every_call_with_input_and_output():
    net, batches = _setup()
    seen = []
    visit_modules(net, [net[0], net[2], net[0]], batches, lambda m, x, y: seen.append((m, x, y)))
    assert [m for m, _, _ in seen] == [net[0], net[2]] * 2
    for (_, x, y), batch in zip(seen[::2], batches, strict=True):
        assert torch.equal(x, batch)
        assert torch.equal(y, net[0](batch))
        assert not y.requires_grad


def test_skips_the_rest_of_the_network_once_all_calls_were_seen():
    net, batches = _setup()
    ran = []
    net[2].register_forward_hook(lambda *_: ran.append(1))
    seen = []
    visit_modules(net, [net[0]], batches, lambda m, x, y: seen.append(len(x)), calls=1)
    assert (seen, ran) == ([4, 2], [])


@every("error", [ValueError, KeyboardInterrupt])
def test_leaves_no_hooks_behind(error):
    net, batches = _setup()

    def stop(*_):
        raise error

    with pytest.raises(error):
        visit_modules(net, [net[0]], batches, stop)
    assert not net[0]._forward_hooks
