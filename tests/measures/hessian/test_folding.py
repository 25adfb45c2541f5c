"""Folding changes the graph and nothing else."""

import pytest
import torch
from every import every
from torch import nn

from lightning_caq.measures.hessian.folding import batchnorm_folded
from lightning_caq.measures.hessian.hessian import Hessian
from lightning_caq.network.layers import find_layers
from lightning_caq.network.objective import make_objective


def _trained_statistics(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """Batch-norms whose statistics, scales and shifts are not those of a new module."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 1)
    net.train()(x)
    return net.double().eval()


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (2, 5, 5),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
        ),
        (2, 5),
    ),
}


@every("name", NETS)
def test_outputs_and_second_derivatives_stay(name):
    make, shape = NETS[name]
    x = torch.randn(16, *shape)
    net = _trained_statistics(make(), x)
    x = x.double()
    layers = find_layers(net, x)
    objective = make_objective("distill", net, [x])
    before = net(x)
    v = torch.randn(sum(layer.weights for layer in layers), dtype=torch.float64)
    product = Hessian(net, layers, objective).product(v)
    keys = list(net.state_dict())
    with batchnorm_folded(net, layers, x):
        assert net[1].forward(x) is x  # the batch-norm is really out of the way
        torch.testing.assert_close(net(x), before)
        torch.testing.assert_close(Hessian(net, layers, objective).product(v), product)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    assert list(net.state_dict()) == keys
    assert not any("forward" in vars(module) for module in net.modules())


def test_an_output_that_is_used_twice_is_not_folded():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            return y + self.bn(y)

    x = torch.randn(8, 3)
    net = Net()
    net.train()(x)
    net.eval()
    before = net(x)
    with batchnorm_folded(net, find_layers(net, x), x):
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_an_error_inside_leaves_the_network_whole():
    x = torch.randn(8, 5)
    net = _trained_statistics(NETS["linear"][0](), x).float()
    before = net(x)
    with pytest.raises(KeyboardInterrupt), batchnorm_folded(net, find_layers(net, x), x):
        raise KeyboardInterrupt
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
