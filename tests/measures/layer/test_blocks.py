"""Blocks: what is taken into f_i, and the Lipschitz constants of it."""

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.measures.layer.blocks import record_blocks
from lightning_caq.network.layers import find_layers

ACTIVATIONS = {
    "relu": (nn.ReLU(), 1.0), "relu_inplace": (nn.ReLU(inplace=True), 1.0), "relu6": (nn.ReLU6(), 1.0),
    "hardtanh": (nn.Hardtanh(), 1.0), "leaky": (nn.LeakyReLU(0.2), 1.0), "steep_leaky": (nn.LeakyReLU(3.0), 3.0),
    "elu": (nn.ELU(), 1.0), "steep_elu": (nn.ELU(2.0), 2.0), "gelu": (nn.GELU(), 1.129),
    "gelu_tanh": (nn.GELU("tanh"), 1.129), "silu": (nn.SiLU(), 1.0999), "silu_inplace": (nn.SiLU(True), 1.0999),
    "mish": (nn.Mish(), 1.0885), "hardswish": (nn.Hardswish(), 1.5), "softplus": (nn.Softplus(beta=5), 1.0),
    "tanh": (nn.Tanh(), 1.0), "sigmoid": (nn.Sigmoid(), 0.25),
}  # fmt: skip


def _record(net, x):
    net.eval()
    return record_blocks(net, find_layers(net, x), x)


@every("name", ACTIVATIONS)
def test_activations_are_followed_with_their_constants(name):
    activation, constant = ACTIVATIONS[name]
    x = torch.randn(4, 3)
    (block,) = _record(nn.Sequential(nn.Linear(3, 5), activation), x).values()
    assert block.after_lipschitz == pytest.approx(constant)

    z = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    steepest = float(activation(z.clone()).diff().abs().max() / (z[1] - z[0]))
    assert steepest <= constant * (1 + 1e-6)  # a true bound ...
    assert steepest > 0.99 * constant  # ... and a tight one


def test_a_block_is_the_layer_with_batchnorm_and_activation():
    net, x = nets.cnn().eval(), torch.randn(3, 2, 6, 6)
    blocks = _record(net, x)
    assert list(blocks) == ["0", "3", "6"]
    inside = net[:3](x)
    torch.testing.assert_close(blocks["0"](x), inside)
    torch.testing.assert_close(blocks["3"].inputs, inside)
    torch.testing.assert_close(blocks["3"](inside), net[3:5](inside))
    norm = net[1]
    scale = (norm.weight.abs() / (norm.running_var + norm.eps).sqrt()).max()
    assert blocks["0"].after_lipschitz == pytest.approx(float(scale.detach()))
    assert [len(block.steps) for block in blocks.values()] == [2, 1, 0]


def test_batchnorm_without_running_statistics_ends_a_block():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    (block,) = _record(nn.Sequential(nn.Linear(3, 4), norm, nn.ReLU()), torch.randn(5, 3)).values()
    assert (block.steps, block.after_lipschitz) == ([], 1.0)


def test_what_mixes_in_something_else_ends_a_block():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return F.relu(self.fc(x) + x)

    (block,) = _record(Residual(), torch.randn(5, 3)).values()
    assert block.steps == []


def test_of_repeated_calls_the_first_counts():
    x = torch.randn(5, 4)
    blocks = _record(nets.Twice(), x)
    torch.testing.assert_close(blocks["first"].inputs, x)
    assert [len(block.steps) for block in blocks.values()] == [1, 0]


def test_a_sum_in_place_ends_the_block():
    """What follows ``y += x`` acts on another function than the layer's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            y += x
            return torch.relu(y)

    net, x = Net().eval(), torch.randn(5, 4)
    assert record_blocks(net, find_layers(net, x), x)["fc"].steps == []
