"""A layer as a matrix, against the layer itself."""

import nets
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.network.layer_matrix import columns, count_positions, from_matrix, to_matrix
from lightning_caq.network.layers import apply_weight, quantizable_layers


def _linear():
    return nn.Linear(5, 3), (5,)


LAYERS = {**{k: lambda k=k: (nets.CONVOLUTIONS[k][0](), nets.CONVOLUTIONS[k][1]) for k in nets.CONVOLUTIONS},
          "linear": _linear, "tokens": lambda: (nn.Linear(5, 3), (2, 4, 5))}  # fmt: skip


def _setup(name):
    module, shape = LAYERS[name]()
    module.double()
    (layer,) = quantizable_layers(nn.Sequential(module))
    return module, layer, torch.randn(3, *shape, dtype=torch.float64)


def _without_bias(module, x):
    return module(x) - module(torch.zeros_like(x))


@every("name", LAYERS)
def test_matrix_times_columns_is_the_layer(name):
    module, layer, x = _setup(name)
    found = to_matrix(layer, module.weight) @ columns(layer, module, x)
    expected = _without_bias(module, x)
    if layer.kind == "linear":
        found, expected = found.transpose(2, 3).reshape(3, -1), expected.reshape(3, -1)
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@every("name", LAYERS)
def test_round_trip(name):
    module, layer, _ = _setup(name)
    again = from_matrix(layer, to_matrix(layer, module.weight))
    assert torch.equal(again, module.weight)


@every("name", LAYERS)
def test_chosen_positions_are_those_of_all(name):
    module, layer, x = _setup(name)
    whole = columns(layer, module, x)
    assert count_positions(layer, module, x) == whole.shape[-1]
    chosen = torch.rand(len(x), whole.shape[-1]).argsort(1)[:, :3]
    expected = torch.stack([sample[..., places] for sample, places in zip(whole, chosen, strict=True)])
    assert torch.equal(columns(layer, module, x, chosen), expected)


class _SameInForward(nn.Conv2d):  # as in EfficientNet implementations
    def forward(self, x):
        sides = []
        for size, k, step in reversed(list(zip(x.shape[2:], self.kernel_size, self.stride, strict=True))):
            total = max((-(-size // step) - 1) * step + k - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _PaddedByAChild(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((0, 1, 2, 0))

    def forward(self, x):
        return torch.conv2d(self.pad(x), self.weight, bias=self.bias, stride=self.stride, groups=self.groups)


class _Standardized(nn.Conv2d):  # the weight is not the parameter, the columns are those of the operator
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class _ScaledInput(nn.Linear):
    def forward(self, x):
        return F.linear(x * 2, self.weight, self.bias)


class _ByHand(nn.Linear):  # calls no operator: as torch's own class
    def forward(self, x):
        return x @ self.weight.T


def test_subclasses_multiply_what_their_operator_is_given():
    cases = [
        (_SameInForward(3, 4, 3, stride=2), (3, 7, 6)),
        (_SameInForward(4, 4, (3, 5), groups=2), (4, 6, 6)),
        (_PaddedByAChild(3, 6, 3, stride=2), (3, 7, 8)),
        (nn.Conv1d(2, 4, 4, padding="same", dilation=3), (2, 9)),
        (_ScaledInput(5, 3), (2, 5)),
        (_ByHand(5, 3, bias=False), (5,)),
    ]
    for module, shape in cases:
        module.double()
        (layer,), x = quantizable_layers(nn.Sequential(module)), torch.randn(3, *shape, dtype=torch.float64)
        with torch.no_grad():
            found, expected = to_matrix(layer, module.weight) @ columns(layer, module, x), _without_bias(module, x)
        if layer.kind == "linear":
            found, expected = found.transpose(2, 3).reshape(3, -1), expected.reshape(3, -1)
        torch.testing.assert_close(found.reshape(expected.shape), expected)
        assert count_positions(layer, module, x) == columns(layer, module, x).shape[-1]


def test_a_transposed_convolution_gives_the_size_it_is_asked_for():
    module = nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=1, groups=2).double()
    (layer,), x = quantizable_layers(nn.Sequential(module)), torch.randn(2, 4, 5, 4, dtype=torch.float64)
    for size in ((9, 10), (10, 12)):
        with torch.no_grad():
            expected = module(x, size) - module.bias[:, None, None]
            found = to_matrix(layer, module.weight) @ columns(layer, module, x, size=size)
            applied = apply_weight(module, module.weight, x, size)
        torch.testing.assert_close(found.reshape(expected.shape), expected)
        torch.testing.assert_close(applied, expected)


def test_a_weight_that_is_computed_from_the_parameter():
    module = _Standardized(3, 4, 3, padding=1)
    (layer,), x = quantizable_layers(nn.Sequential(module)), torch.randn(2, 3, 5, 5)
    plain = nn.Conv2d(3, 4, 3, padding=1)
    assert torch.equal(columns(layer, module, x), columns(layer, plain, x))
