"""Lipschitz amplification against dense matrices, closed forms and the largest change that samples show."""

import nets
import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.measures.layer.constants import lipschitz_constants, operator_norm
from lightning_caq.measures.layer.lipschitz_amplification import lipschitz_amplification
from lightning_caq.network.layers import find_layers


def _found(net, x):
    net.eval()
    return lipschitz_amplification(net, find_layers(net, x), x, torch.Generator().manual_seed(0))


def _norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


class Branches(nn.Module):
    """A residual block with a sum in place, a shortcut that skips entries, and two branches joined."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.side = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        out = F.relu(self.inner(F.relu(x)))
        out += x
        return torch.cat([F.pad(out[:, ::2], (1, 0)), 3 * self.side(out)], dim=1)


def test_chain_is_the_product_of_singular_values():
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3))
    found = _found(net.double(), torch.randn(4, 5, dtype=torch.float64))
    a, b, c = (_norm(net[i].weight) for i in (0, 2, 5))
    assert found.layers == pytest.approx({"0": b * c, "2": c, "5": 1.0}, rel=2e-3)
    assert found.input == pytest.approx(a * b * c, rel=2e-3)


def test_paths_that_join_are_summed():
    net = Branches().double()
    found = _found(net, torch.randn(4, 4, dtype=torch.float64))
    after = 1 + 3 * _norm(net.side.weight)
    inner = _norm(net.inner.weight)
    assert found.layers == pytest.approx({"first": (1 + inner) * after, "inner": after, "side": 3.0}, rel=2e-3)


def test_convolutions_batchnorm_and_pooling_are_operators_on_images():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3), nn.ReLU(True), nn.MaxPool2d(3, 2),
        nn.Conv2d(3, 4, 2), nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    nets.shake_batchnorm(net)
    found = _found(net, torch.randn(3, 2, 7, 7, dtype=torch.float64))
    conv = nets.dense_operator(lambda x: net[4](x) - net[4](torch.zeros_like(x)), (3, 3, 3))
    pool = nets.dense_operator(net[5], (4, 2, 2))
    normed = float((net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach().abs().max())
    tail = _norm(pool) * _norm(net[7].weight)
    # Windows of 3 at steps of 2 hold an entry up to twice an axis.
    expected = {"0": normed * 2 * _norm(conv) * tail, "4": tail, "7": 1.0}
    assert found.layers == pytest.approx(expected, rel=2e-3)


@every("case", [name for name in nets.CASES if name != "twice"])
def test_no_change_is_stretched_by_more(case):
    case = nets.make_case(case)
    layers, batch = find_layers(case.net, case.batches[0]), case.batches[0]
    found = lipschitz_amplification(case.net, layers, batch, torch.Generator().manual_seed(0))
    before = case.output(case.net, batch)
    for layer in layers:
        for scale in (1e-3, 1.0):
            sizes = []

            def push(module, args, output, scale=scale, sizes=sizes):
                change = scale * torch.randn_like(output)
                sizes.append(change.square().sum())
                return output + change

            handles = [case.net.get_submodule(name).register_forward_hook(push) for name in layer.modules]
            moved = case.output(case.net, batch) - before
            for handle in handles:
                handle.remove()
            assert 0 < moved.norm() <= (1 + 1e-9) * found.layers[layer.name] * sum(sizes).sqrt()


def test_calls_of_one_weight_are_added():
    net = nets.Twice().double().eval()
    found = _found(net, torch.randn(4, 4, dtype=torch.float64))
    assert found.layers["first"] == pytest.approx((1 + _norm(net.first.weight)) * _norm(net.out.weight), rel=2e-3)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


@every(
    ("function", "expected"),
    [
        (lambda x: x.clone().add_(x), 2.0),
        (lambda x: 1 - x, 1.0),
        (lambda x: x / torch.tensor([0.5, 2.0, 4.0]), 2.0),
        (lambda x: x[:, :1] * torch.tensor([3.0, 1.0]), 3 * 2**0.5),  # a column that is repeated
        (lambda x: x + x.mean(1, keepdim=True), 2.0),  # 1 + (1 / √3) √3
        (lambda x: x.chunk(3, 1)[1].reshape(-1), 1.0),
        (lambda x: F.log_softmax(x, dim=1), 3**0.5),
        (lambda x: F.interpolate(x[:, None], scale_factor=2), 2**0.5),
        (lambda x: F.max_pool1d(x[:, None], 2, stride=1), 2**0.5),
        (lambda x: x.clamp(0, 1), 1.0),
        (Tripled.apply, 3.0),
    ],
)
def test_single_functions(function, expected):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return function(self.fc(x))

    assert _found(Net(), torch.randn(4, 3)).layers["fc"] == pytest.approx(expected, rel=2e-3)


def _unseen(x):
    with torch._C.DisableTorchFunction():
        return 3 * x


def _scaled_by_number(x):
    return x / x.norm().item()


def _written_into(x):
    buffer = torch.zeros(len(x), 4)
    buffer[:, :3] = x
    return buffer


def _changed_through_a_view(x):
    view = x.view(-1)
    x.add_(x.clone())
    return view.reshape(-1, 3)


@every(
    ("function", "words"),
    [
        (lambda x: x * x, "'mul'"),
        (lambda x: torch.div(x, 0.5, rounding_mode="floor"), "'div'"),
        (lambda x: F.layer_norm(x, (3,)), "'layer_norm'"),
        (lambda x: F.dropout(x, 0.5, training=True), "'dropout'"),
        (lambda x: F.batch_norm(x, None, None, training=True), "'batch_norm'"),
        (_unseen, "cannot be watched"),
        (lambda x: torch.batch_norm(x, None, None, *torch.ones(2, 3), False, 0.1, 1e-5, False), "'batch_norm'"),
        (_scaled_by_number, "'norm'"),
        (lambda x: x * x.sum().item(), "'item'"),
        (_written_into, "'setitem'"),
        (_changed_through_a_view, "changed in place"),
    ],
)
def test_what_is_not_known_is_named_and_not_guessed(function, words):
    class Inner(nn.Module):
        def forward(self, x):
            return function(x)

    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(Inner())).eval()
    message = rf"'lipschitz_amplification' cannot be taken.*{words}.*'amplification'"
    with pytest.raises(OptionError, match=message) as error:
        _found(net, torch.randn(4, 3))
    assert ("in the network" if function is _unseen else "in '1.0' (Inner)") in str(error.value)


def test_nothing_is_left_behind():
    net = nets.cnn().double().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    before = net(x)
    with torch.no_grad():
        found = _found(net, x)
    assert torch.equal(net(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert min(found.layers.values()) > 0


def test_operator_norm_of_an_affine_map():
    matrix = torch.randn(6, 4, dtype=torch.float64)
    found = operator_norm(lambda x: matrix @ x + 5, torch.zeros(4, dtype=torch.float64), torch.Generator())
    assert found == pytest.approx(_norm(matrix), rel=1e-3)
    assert operator_norm(lambda x: 0 * x + 1, torch.zeros(4), torch.Generator()) == 0


def test_division_by_zero_has_no_constant():
    x = torch.ones(2)
    assert lipschitz_constants(torch.div, (x, torch.tensor([1.0, 0.0])), {}, [x], x, torch.Generator()) is None
