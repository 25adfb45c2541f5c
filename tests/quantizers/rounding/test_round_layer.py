"""Error feedback against Optimal Brain Quantization written out in numpy, and against all roundings of tiny layers."""

import itertools

import nets
import numpy as np
import rounding_help
import torch
from channel_layers import CHANNEL_LAYERS, WIDTHS, channel, one_layer
from every import every
from torch import nn

from lightning_caq.network.layer_matrix import from_matrix, to_matrix
from lightning_caq.network.layers import Layer, find_layers
from lightning_caq.quantizers.grids.affine import fit_grid
from lightning_caq.quantizers.grids.values import fit_codebook
from lightning_caq.quantizers.rounding import moments, round_layer
from lightning_caq.quantizers.rounding.descent import improve
from lightning_caq.quantizers.rounding.moments import InputMoments
from lightning_caq.quantizers.rounding.round_layer import corrected_weight, round_error_feedback, round_nearest
from lightning_caq.sizes import CODEBOOKS

DAMPING, CORRECTION_DAMPING = 0.01, 0.1


def _obq(w, scale, zero, bits, curvature):
    """Codes of one matrix, float64, with an explicit inverse over the remaining columns at every step."""
    w, h = w.astype(np.float64).copy(), curvature.astype(np.float64)
    h = h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h))
    order = list(np.argsort(-np.diag(curvature), kind="stable"))
    codes = np.zeros_like(w)
    while order:
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        j, rest = order[0], order[1:]
        codes[:, j] = np.clip(np.rint(w[:, j] / scale[:, j] + zero[:, j]), 0, 2**bits - 1)
        error = (w[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])) / inverse[0, 0]
        w[:, rest] -= np.outer(error, inverse[0, 1:])
        order = rest
    return codes


def _matrices(layer, grid, weight):
    full = (weight, grid.scale.expand(layer.shape), grid.zero_point.expand(layer.shape))
    return [to_matrix(layer, x.detach()).numpy() for x in full]


def _correlated(samples, columns, seed=0):
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draws) * torch.rand(columns, generator=draws)
    return torch.randn(samples, columns, generator=draws) @ mix + 0.5


LAYERS = {
    "linear": lambda: (nn.Linear(12, 20), (12,)),
    "longer_than_a_block": lambda: (nn.Linear(90, 10), (90,)),
    "several_blocks": lambda: (nn.Linear(150, 6), (150,)),
    **{k: nets.CONVOLUTIONS[k] for k in ("stride_padding", "same", "reflect", "groups", "depthwise", "dilation")},
    **{k: nets.CONVOLUTIONS[k] for k in ("conv3d", "transposed", "transposed_all")},
}


def _layer(name):
    made = LAYERS[name]
    module, shape = made() if callable(made) else (made[0](), made[1])
    net = nn.Sequential(module)
    x = _correlated(40, int(torch.Size(shape).numel())).reshape(40, *shape)
    (layer,) = find_layers(net, x)
    return net, module, layer, x


@every("bits", [2, 4])
@every("name", LAYERS)
def test_equals_optimal_brain_quantization(name, bits):
    net, module, layer, x = _layer(name)
    curvature = rounding_help.moments(net, layer, [x[:15], x[15:]], {}).curvature
    grid = fit_grid(module.weight, bits, layer.channel_shape)
    codes = round_error_feedback(layer, module.weight, grid, curvature)
    w, scale, zero = _matrices(layer, grid, module.weight)
    expected = np.stack([_obq(w[g], scale[g], zero[g], bits, curvature[g].numpy()) for g in range(layer.groups)])
    expected = from_matrix(layer, torch.from_numpy(expected)).to(torch.uint8)
    rows = (codes == expected).movedim(1 if layer.transposed else 0, 0).flatten(1).all(1)
    # A tie decided by float32 noise may send one channel another way, not more.
    assert int((~rows).sum()) <= len(rows) // 10
    assert codes.dtype == torch.uint8
    assert codes.shape == module.weight.shape
    assert codes.is_contiguous()


@every("bits", [2, 4])
@every("name", ["linear", "several_blocks", "stride_padding", "groups"])
def test_groups_equal_optimal_brain_quantization_with_a_scale_for_every_weight(name, bits):
    net, module, layer, x = _layer(name)
    curvature = rounding_help.moments(net, layer, [x], {}).curvature
    grid = fit_grid(module.weight, bits, layer.channel_shape, group_size=8)
    rows = torch.Size(layer.channel_shape).numel()
    columns = module.weight[0].numel()
    spread = (np.repeat(y.numpy().reshape(rows, -1), 8, 1)[:, :columns] for y in (grid.scale, grid.zero_point))
    scale, zero = (y.reshape(layer.groups, -1, columns) for y in spread)
    w = to_matrix(layer, module.weight.detach()).numpy()
    expected = np.concatenate([_obq(w[g], scale[g], zero[g], bits, curvature[g].numpy()) for g in range(layer.groups)])
    codes = round_error_feedback(layer, module.weight, grid, curvature).flatten(1)
    same = (codes == torch.from_numpy(expected).to(torch.uint8)).all(1)
    assert int((~same).sum()) <= len(same) // 10


def _output_error(w, rounded, h):
    d = (rounded - w).double()
    return float((d @ h.double() * d).sum())


def test_against_all_roundings_of_tiny_layers():
    """Each of 8 weights down or up: 256 roundings. Feedback must come near the best of them, nearest need not."""
    bits, columns, better, ratios, gains = 3, 8, 0, [], []
    layer = Layer("fc", "linear", (1, columns))
    draws = torch.Generator().manual_seed(0)
    for trial in range(60):
        z = _correlated(50, columns, trial)
        h = z.T @ z / len(z)
        w = torch.randn(1, columns, generator=draws)
        grid = fit_grid(w, bits, (1, 1))
        low = (w / grid.scale + grid.zero_point).floor()
        choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=columns)))
        best = min(_output_error(w, grid.values((low + up).clamp(0, 7)), h) for up in choices)
        feedback = _output_error(w, grid.values(round_error_feedback(layer, w, grid, h[None])), h)
        nearest = _output_error(w, grid.values(round_nearest(w, grid)), h)
        better += feedback <= nearest * (1 + 1e-6)
        gains.append(nearest / feedback)
        ratios.append(feedback / best)
    assert better >= 54  # nine out of ten
    assert np.median(gains) > 1.25
    assert np.median(ratios) < 2.5
    assert min(gains) > 0.3  # and where it loses, not by much


@every("bits", [2, 3, 4])
def test_beats_nearest_on_the_output_of_correlated_inputs(bits):
    z = _correlated(400, 60)
    layer, w = Layer("fc", "linear", (16, 60)), torch.randn(16, 60)
    h = z.T @ z / len(z)
    grid = fit_grid(w, bits, (16, 1))
    errors = [
        (z @ (grid.values(codes) - w).T).square().sum(0)
        for codes in (round_error_feedback(layer, w, grid, h[None]), round_nearest(w, grid))
    ]
    assert float(errors[0].sum()) < 0.75 * float(errors[1].sum())
    assert bool((errors[0] < errors[1]).all())


def test_independent_inputs_leave_nothing_to_feed_back():
    w = torch.randn(5, 9)
    grid = fit_grid(w, 3, (5, 1))
    codes = round_error_feedback(Layer("fc", "linear", (5, 9)), w, grid, torch.diag(torch.rand(9) + 0.1)[None])
    assert torch.equal(codes, round_nearest(w, grid))


@every("curvature", [torch.zeros(6, 6), torch.ones(6, 6), torch.diag(torch.tensor([1e12, 1.0, 0, 0, 0, 1e-12]))])
def test_singular_curvature(curvature):
    w = torch.randn(3, 6)
    grid = fit_grid(w, 2, (3, 1))
    codes = round_error_feedback(Layer("fc", "linear", (3, 6)), w, grid, curvature[None])
    assert int(codes.max()) <= 3


def test_corrected_weight_is_the_ridge_regression_on_the_float_outputs():
    draws = torch.Generator().manual_seed(0)
    z_float, w = torch.randn(50, 7, generator=draws).double(), torch.randn(4, 7, generator=draws).double()
    z = z_float @ torch.randn(7, 7, generator=draws).double() + torch.randn(50, 7, generator=draws)
    moments_of = InputMoments((z.T @ z / 50)[None], (w @ (z_float - z).T @ z / 50)[None])
    found = corrected_weight(Layer("fc", "linear", (4, 7)), w, moments_of)
    ridge = CORRECTION_DAMPING * float((z.T @ z / 50).diagonal().mean())
    rows = np.concatenate([z.numpy() / 50**0.5, ridge**0.5 * np.eye(7)])
    aims = np.concatenate([(z_float @ w.T).numpy() / 50**0.5, ridge**0.5 * w.T.numpy()])
    torch.testing.assert_close(found, torch.from_numpy(np.linalg.lstsq(rows, aims, rcond=None)[0].T))


@every("name", ["linear", "groups", "transposed_all"])
def test_without_drift_the_weight_stays(name):
    net, module, layer, x = _layer(name)
    assert torch.equal(
        corrected_weight(layer, module.weight, rounding_help.moments(net, layer, [x], {})), module.weight
    )


def test_round_layer_aims_at_the_float_outputs():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), _correlated(2000, 20)
    floats = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer, aim = find_layers(net, x)[1], net(x).detach()
    with torch.no_grad():
        net[0].weight.copy_(fit_grid(net[0].weight, 2, (30, 1)).nearest(net[0].weight))
    errors = []
    for known in (floats, {}):  # without the float weights nothing is known of the drift
        grid, codes = rounding_help.rounded(net, layer, 3, "error_feedback", [x[:1000]], known)
        out = torch.relu(net[0](x[1000:])) @ grid.values(codes).T + net[2].bias
        errors.append(float((out - aim[1000:]).detach().square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_round_layer_uses_the_inputs_the_layer_sees_now():
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), _correlated(60, 6)
    layer = find_layers(net, x)[1]
    before = rounding_help.rounded(net, layer, 2, "error_feedback", [x], {})[1]
    nn.init.normal_(net[0].weight)
    z = torch.relu(net[0](x)).detach()
    grid, h = fit_grid(net[2].weight, 2, layer.channel_shape), (z.T @ z / len(z))[None]
    better, expected = improve(layer, net[2].weight, grid, round_error_feedback(layer, net[2].weight, grid, h), h)
    found, after = rounding_help.rounded(net, layer, 2, "error_feedback", [x], {})
    assert torch.equal(after, expected)
    torch.testing.assert_close(found.scale, better.scale)
    assert not torch.equal(after, before)


def test_nearest_takes_the_grid_as_it_is_fitted():
    net, module, layer, x = _layer("linear")
    grid, codes = rounding_help.rounded(net, layer, 3, "nearest", [x], {})
    assert torch.equal(grid.scale, fit_grid(module.weight, 3, layer.channel_shape).scale)
    assert torch.equal(codes, round_nearest(module.weight, grid))


def test_damping_is_the_one_of_the_reference():
    assert (moments._DAMPING, round_layer._CORRECTION_DAMPING) == (DAMPING, CORRECTION_DAMPING)


def test_does_not_touch_the_weight():
    net, module, layer, x = _layer("linear")
    before = module.weight.detach().clone()
    rounding_help.rounded(net, layer, 2, "error_feedback", [x], {})
    assert torch.equal(module.weight, before)


@every("quantizer", CODEBOOKS)
@every("shape", [(6, 20), (8, 3, 3, 3)])
def test_error_feedback_lowers_the_output_error(quantizer, shape):
    draw = torch.Generator().manual_seed(5)
    w = 0.3 * torch.randn(shape, generator=draw)
    layer = Layer("x", "linear" if len(shape) == 2 else "conv2d", shape)
    columns = w[0].numel()
    z = torch.randn(200, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    book = fit_codebook(w, 3, layer.channel_shape, quantizer)

    def error(codes):
        return float((z @ (book.values(codes) - w).reshape(len(w), -1).T).square().sum())

    curvature = (z.T @ z / len(z))[None]
    assert error(round_error_feedback(layer, w, book, curvature)) < 0.8 * error(round_nearest(w, book))


def test_error_feedback_on_a_table_of_even_steps_is_that_on_a_grid():
    draw = torch.Generator().manual_seed(6)
    w, z = torch.randn(4, 12, generator=draw), torch.randn(100, 12, generator=draw)
    layer = Layer("x", "linear", (4, 12))
    book = fit_codebook(w, 4, (4, 1), "dorefa")
    steps, tops = book.table[0, 0].double().numpy(), 15
    order = np.argsort(-(z.T @ z).diagonal().numpy(), kind="stable")
    h = (z.T @ z / 100).double().numpy()
    h = h + 0.01 * h.diagonal().mean() * np.eye(12)
    left, x, expected = list(order), w.double().numpy().copy(), np.zeros((4, 12), int)
    while left:  # the definition: the inverse of what is left is taken anew for every column
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        expected[:, j] = np.abs(x[:, j, None] - steps).argmin(1)
        error = (x[:, j] - steps[expected[:, j]]) / inverse[0, 0]
        x[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    found = round_error_feedback(layer, w, book, (z.T @ z / 100)[None])
    assert found.max() <= tops
    assert (found.numpy() == expected).mean() > 0.95  # float32 may decide a tie otherwise


@every("rounding", ["nearest", "error_feedback"])
@every("name", CHANNEL_LAYERS)
def test_each_channel_is_rounded_as_it_would_be_alone(name, rounding):
    """Neither feedback nor descent carries anything from one output channel to another."""
    net, layer, x = one_layer(name)
    grid, codes = rounding_help.rounded(net, layer, WIDTHS, rounding, [x], {})
    assert grid.width == WIDTHS
    assert codes.dtype == torch.uint8
    for c, b in enumerate(WIDTHS):
        alone, own = rounding_help.rounded(net, layer, b, rounding, [x], {})
        assert torch.equal(channel(layer, codes, c), channel(layer, own, c))
        found, wanted = (channel(layer, g.scale.expand(layer.shape), c) for g in (grid, alone))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
