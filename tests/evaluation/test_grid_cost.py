"""What grids for a runtime cost."""

import pytest
import torch
from torch import nn

from lightning_caq import quantize
from lightning_caq.evaluation.grid_cost import restriction_cost
from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.grids.values import Quantizer


def test_weights_on_one_side_of_zero_lose_a_bit():
    net = nn.Linear(1000, 1)
    with torch.no_grad():
        net.weight.copy_(torch.linspace(0, 1, 1000)[None])
    layer = Layer("", "linear", (1, 1000), modules=("",))
    byte, free = Quantizer(range="minmax", symmetry="signed_byte"), Quantizer(range="minmax")
    # Of 256 codes 128 are left: steps twice as long, and four times their square.
    assert restriction_cost(net, [layer], [8], restricted=byte, free=free) == pytest.approx(4, rel=0.05)


def test_the_report_says_it():
    torch.manual_seed(0)
    batches = [torch.randn(32, 8)]
    for runtime, said in (("onnxruntime", 1), ("any", 0)):
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        report = quantize(net, batches, avg_bits=8, method="uniform", compare=(), runtime=runtime).report
        assert sum("squared error of rounding" in str(note) for note in report.notes) == said
