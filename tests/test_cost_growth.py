"""What a run costs, counted in samples that go through the network, must not grow with depth, width or classes."""

import warnings

import torch
from torch import nn

from lightning_caq.network.forward import run_model
from lightning_caq.pipeline import quantize

SAMPLES = 128


def _samples_run(depth, width, classes):
    """How many samples went through the network, forward passes that were begun anew included."""
    torch.manual_seed(0)
    middle = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), *middle, nn.Linear(width, classes))
    count = 0

    def seen(module, args):
        nonlocal count
        count += len(args[0])

    net.register_forward_pre_hook(seen)
    batches = list(torch.randn(SAMPLES, 6).split(32))
    run_model(net, batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples for wide layers
        quantize(net, batches, avg_bits=4, bits=(3, 4, 5))
    return count


def test_depth_costs_no_passes():
    """Nearly five times as many layers: what is measured of each of them comes from the same passes."""
    shallow, deep = _samples_run(5, 8, 4), _samples_run(24, 8, 4)
    assert deep < 1.3 * shallow


def test_width_and_classes_cost_no_passes():
    narrow, wide = _samples_run(3, 8, 4), _samples_run(3, 160, 300)
    assert wide < 1.3 * narrow
