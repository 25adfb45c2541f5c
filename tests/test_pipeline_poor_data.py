"""Dead inputs, constant channels, ranges of zero and too few samples, from the network to the report."""

import copy
import math
import re
import warnings

import nets
import torch
from every import every
from torch import nn

from lightning_caq import quantize

FAST = {"curvature_samples": 32, "eigenpairs": 4, "compare": (), "guard": False, "avg_bits": 3, "bits": (2, 3, 4)}


@every("activation_bits", [None, 4])
def test_a_network_with_all_of_them(activation_bits):
    torch.manual_seed(5)
    net = nets.small_cnn().eval()
    with torch.no_grad():
        net[0].weight[0] = 0  # a constant channel, then a batch-norm that turns it into a negative constant: dead
        net[1].bias[0] = -1
        net[1].weight[1], net[1].bias[1] = 0, -1  # dead behind a batch-norm without scale
        net[4].weight[:3] = 0.2  # constant channels
        net[10].weight.zero_()  # a layer without any range
    floats, x = copy.deepcopy(net), nets.images(96, 1)[0]
    result = quantize(net, [x], activation_bits=activation_bits, **FAST)
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values() if tensor.is_floating_point())
    assert all(math.isfinite(value) for value in result.report.metrics.values())
    with torch.no_grad():
        assert torch.equal(result.model[10].weight, floats[10].weight)
        assert not result.model[0].weight[0].any()
        torch.testing.assert_close(result.model(x), floats(x), rtol=0.05, atol=0.05)  # the bias of the last layer


def test_too_few_samples_are_told_once_and_made_up_for():
    torch.manual_seed(7)
    net, x = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 4)), torch.randn(32, 60)
    told = r"fitted to 28 samples, not half .* at the input of '0' \(60\); damping .* calibration_samples=69 are enough"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = quantize(net, [x], inplace=False, **{**FAST, "compare": ("uniform",)})
    (shortage,) = [str(w.message) for w in seen if "samples" in str(w.message)]
    assert shortage.startswith("caq: ")
    assert re.search(told, shortage)
    assert sum(bool(re.search(told, note)) for note in result.report.notes) == 1
    assert all(tensor.isfinite().all() for tensor in result.model.state_dict().values() if tensor.is_floating_point())


@every("options", [{"rounding": "nearest", "calibration_samples": 24}, {"calibration_samples": 48}])
def test_nothing_is_told_where_it_does_not_matter(options):
    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 4)), torch.randn(69, 60)
    result = quantize(net, [x], **{**FAST, **options})  # a warning would be an error here
    assert not any("fitted to" in note for note in result.report.notes)
