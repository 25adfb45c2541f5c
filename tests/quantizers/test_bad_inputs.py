"""Dead inputs, constant channels, ranges of zero and too few samples, on the way that rounding takes."""

import copy
import math
import re
import warnings

import nets
import rounding_help
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.network.layer_matrix import columns
from lightning_caq.network.layers import find_layers
from lightning_caq.quantizers.rounding.moments import samples_needed

FAST = {"curvature_samples": 32, "eigenpairs": 4, "compare": (), "guard": False, "avg_bits": 3, "bits": (2, 3, 4)}
LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), (12,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
}


def _round(module, x, rounding="error_feedback", bits=3):
    net = nn.Sequential(copy.deepcopy(module))
    (layer,) = find_layers(net, x)
    floats = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    grid, codes = rounding_help.rounded(net, layer, bits, rounding, [x], floats)
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        rounded.weight.copy_(grid.values(codes))
    return rounded, grid, codes


def _error(module, rounded, x):
    with torch.no_grad():
        return float((module(x) - rounded(x)).square().mean())


@every("kind", LAYERS)
def test_channels_that_are_always_zero_say_nothing_about_the_others(kind):
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    module, x = make(), torch.randn(64, *shape) + 0.5
    x[:, ::2] = 0
    found, _, codes = _round(module, x)
    near = _round(module, x, "nearest")[0]
    assert found.weight.isfinite().all()
    assert int(codes.max()) < 8
    assert _error(module, found, x) < _error(module, near, x)
    # What meets the dead channels may not have moved far from its float value: nothing pulls it anywhere.
    dead = (found.weight - module.weight)[::2] if kind == "transposed" else (found.weight - module.weight)[:, ::2]
    span = (module.weight.max() - module.weight.min()) / 7
    assert dead.abs().max() < 1.5 * span


@every("kind", LAYERS)
def test_without_any_input_weights_go_to_the_nearest_values(kind):
    torch.manual_seed(2)
    make, shape = LAYERS[kind]
    module, x = make(), torch.zeros(8, *shape)
    found, grid, codes = _round(module, x)
    assert torch.equal(codes, grid.codes(module.weight).to(torch.uint8))
    assert (found.weight - module.weight).abs().max() < (module.weight.max() - module.weight.min()) / 4


@every("value", [0.0, 0.3, -1e-30, 70.0])
@every("kind", LAYERS)
def test_constant_channels_are_kept_by_error_feedback(kind, value):
    torch.manual_seed(3)
    make, shape = LAYERS[kind]
    module, x = make(), torch.randn(64, *shape)
    with torch.no_grad():
        (module.weight[:, :2] if kind == "transposed" else module.weight[:2]).fill_(value)
    found, grid, _ = _round(module, x)
    held = found.weight[:, :2] if kind == "transposed" else found.weight[:2]
    torch.testing.assert_close(held, torch.full_like(held, value), rtol=1e-5, atol=1e-12)
    assert grid.scale.isfinite().all()
    assert (grid.scale > 0).all()


def test_inputs_that_never_change_still_leave_outputs_right():
    torch.manual_seed(4)
    module, x = nn.Linear(12, 6), torch.randn(1, 12).expand(40, 12)
    found = _round(module, x, bits=2)[0]
    # One direction carries everything: twelve weights with four values each can meet it closely.
    assert _error(module, found, x) < 0.02 * _error(module, _round(module, x, "nearest", bits=2)[0], x) + 1e-6


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


def _columns_of(module, x):
    (layer,) = find_layers(nn.Sequential(module), x)
    z = columns(layer, module, x).movedim(0, 2).flatten(2)
    return layer, z.double()


@every(
    ("module", "shape"),
    [
        (nn.Linear(20, 3), (20,)),
        (nn.Linear(20, 3), (4, 20)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2), (4, 5, 5)),
        (nn.ConvTranspose2d(6, 2, 2, stride=2), (6, 2, 2)),
        (nn.ConvTranspose1d(6, 4, 3, stride=3, groups=2), (6, 2)),
    ],
)
def test_samples_that_are_needed_are_those_of_full_rank(module, shape):
    """Of random inputs: at the number that is told the moments have full rank, at one less they do not."""
    torch.manual_seed(6)
    net, x = nn.Sequential(module), torch.randn(64, *shape)
    layer, _ = _columns_of(module, x)
    (needed,) = samples_needed(net, [layer], 0).values()
    rows = _columns_of(module, x[:1])[1].shape[1]
    assert torch.linalg.matrix_rank(_columns_of(module, x[:needed])[1])[0] <= rows
    assert _columns_of(module, x[:needed])[1].shape[2] >= rows
    if needed > 1:
        assert _columns_of(module, x[: needed - 1])[1].shape[2] < rows
        assert torch.linalg.matrix_rank(_columns_of(module, x[: needed - 1])[1])[0] < rows
    assert samples_needed(net, [layer], needed) == {}


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


def test_words_and_idle_layers_need_no_samples():
    words, tokens = nets.Words(), torch.randint(0, 6, (3, 4))
    found = samples_needed(words, find_layers(words, tokens)[:1], 0)
    assert found == {}
