import nets
import pytest
import torch
from every import every
from torch import nn
from torch.nn.utils import parametrizations

from lightning_caq.errors import CalibrationError, LayerError, OptionError
from lightning_caq.network.layers import (
    Layer,
    apply_weight,
    find_layers,
    kind_of,
    layer_sizes,
    layer_weight,
    quantizable_layers,
)


class Late(nn.Module):
    """Registered in another order than it runs in; one layer never runs."""

    def __init__(self):
        super().__init__()
        self.head, self.idle, self.body = nn.Linear(4, 2), nn.Linear(9, 9), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Scaled(nn.Linear):
    """A subclass of the user's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_come_in_the_order_they_run_in():
    layers = find_layers(Late(), torch.randn(5, 3))
    assert [(x.name, x.calls, x.macs) for x in layers] == [("body", 1, 12), ("head", 1, 8), ("idle", 0, 0)]


@every("name", nets.CONVOLUTIONS)
def test_macs_of_convolutions(name):
    """Every output position multiplies the whole kernel; for a transposed one it is every input position."""
    make, shape = nets.CONVOLUTIONS[name]
    module = make().double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    (layer,) = find_layers(nn.Sequential(module), x)
    side = x if "transposed" in name else module(x)
    assert layer.macs == module.weight.numel() * side[0, 0].numel()
    assert layer.kind == type(module).__name__.lower().replace("transpose", "_transpose")
    assert (layer.groups, layer.weights) == (module.groups, module.weight.numel())


def test_macs_of_tokens_words_and_repeated_layers():
    assert find_layers(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 7, 3))[0].macs == 7 * 6
    table, mix = find_layers(nets.Words(), torch.randint(0, 6, (2, 5)))
    assert (table.name, table.kind, table.modules) == ("table", "embedding", ("table", "out"))
    assert (table.calls, table.macs) == (2, 5 * 18)  # the look-up costs nothing, the output layer does
    assert mix.macs == 5 * 9
    first, out = find_layers(nets.Twice(), torch.randn(4, 4))
    assert (first.modules, first.calls, first.macs) == (("first", "second"), 2, 2 * 16)
    assert out.modules == ("out",)


def test_a_shared_table_counts_as_the_table_whichever_comes_first():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.table = nn.Linear(3, 6, bias=False), nn.Embedding(6, 3)
            self.out.weight = self.table.weight

        def forward(self, tokens):
            return self.out(self.table(tokens))

    (layer,) = find_layers(Reversed(), torch.randint(0, 6, (2, 5)))
    assert (layer.name, layer.kind) == ("out", "embedding")


def test_subclasses_are_found_and_parametrized_weights_are_not():
    net = nn.Sequential(Scaled(3, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.LayerNorm(4), nn.Linear(4, 2))
    assert [x.name for x in find_layers(net, torch.randn(2, 3))] == ["0", "3"]
    assert kind_of(net[0]) == "linear"
    assert kind_of(net[2]) is None


def test_batchnorm_that_takes_the_output_as_it_is():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(),
        nn.Linear(8, 3), nn.BatchNorm1d(3),
    ).eval()  # fmt: skip
    layers = find_layers(net, torch.randn(2, 1, 4, 4))
    assert [x.batchnorm for x in layers] == ["1", None, "7"]


@every("name", nets.CONVOLUTIONS)
def test_channels_are_those_of_the_output(name):
    make, _ = nets.CONVOLUTIONS[name]
    module = make()
    (layer,) = quantizable_layers(nn.Sequential(module))
    shared = module.groups if "transposed" in name else 1
    assert layer.channels * shared == module.out_channels
    assert torch.ones(layer.channel_shape).expand(layer.shape).shape == module.weight.shape


def test_sizes():
    layers = find_layers(Late(), torch.randn(5, 3))
    sizes = layer_sizes(layers, 7)
    assert (sizes.weights, sizes.channels, sizes.unquantized) == ((12, 8, 81), (4, 2, 9), 7)


def test_include_and_exclude():
    net, x = nets.small_cnn(), torch.randn(2, 1, 8, 8)
    names = lambda **kw: [layer.name for layer in find_layers(net, x, **kw)]  # noqa: E731
    assert names() == ["0", "4", "10"]
    assert names(include=["?"]) == ["0", "4"]
    assert names(exclude=["0", "1*"]) == ["4"]
    assert names(include=["*"], exclude=["4"]) == ["0", "10"]
    words = nets.Words()
    assert [y.name for y in find_layers(words, torch.zeros(1, 2).long(), exclude=["out"])] == ["mix"]  # tied with table


def test_weights_can_be_tried_without_being_set():
    net = nn.Conv2d(2, 3, 3, padding=1)
    kept, x, other = net.weight, torch.randn(4, 2, 5, 5), torch.randn(3, 2, 3, 3)
    found = apply_weight(net, other, x)
    torch.testing.assert_close(found, nn.functional.conv2d(x, other, padding=1))
    assert net.weight is kept
    with pytest.raises(RuntimeError):
        apply_weight(net, torch.randn(3, 5, 3, 3), x)
    assert net.weight is kept
    assert layer_weight(nn.Sequential(net), Layer("0", "conv2d", (3, 2, 3, 3))) is kept


def test_finding_layers_leaves_no_trace():
    net = nets.small_cnn()
    state, rng = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    find_layers(net.eval(), torch.zeros(2, 1, 8, 8))
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_bad_input():
    x = torch.randn(2, 3)
    with pytest.raises(
        LayerError, match="Sequential has no layer that can be quantized; known kinds are Linear, Conv1d"
    ):
        find_layers(nn.Sequential(nn.ReLU()), x)
    with pytest.raises(OptionError, match="include pattern 'conv' matches no layer; the layers are '0', '2'"):
        find_layers(nets.mlp(), x, include=["0", "conv"])
    with pytest.raises(OptionError, match="exclude pattern '1' matches no layer"):
        find_layers(nets.mlp(), x, exclude=["1"])
    with pytest.raises(LayerError, match="include and exclude leave no layer"):
        find_layers(nets.mlp(), x, exclude=["*"])
    with pytest.raises(CalibrationError, match="Sequential cannot take a calibration batch"):
        find_layers(nets.mlp(), x)


@every("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value):
    net = nets.mlp()
    with torch.no_grad():
        net[2].weight[1, 1] = value
    with pytest.raises(LayerError, match="Layer '2' holds NaN or infinite weights"):
        find_layers(net, torch.randn(2, 4))
    assert [x.name for x in find_layers(net[:1], torch.randn(2, 4))] == ["0"]


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers():
    with pytest.raises(LayerError, match="Layer '0' is lazy and not initialised"):
        find_layers(nn.Sequential(nn.LazyLinear(2)), torch.randn(2, 4))


def test_layers_that_only_a_later_batch_reaches_stand_where_they_run():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.low, self.high, self.never = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            return self.last(self.high(x) if bool(x.mean() > 0) else self.low(x))

    layers = find_layers(Experts(), -torch.ones(2, 3), torch.ones(4, 3))
    reached = [("high", 1, 9), ("low", 1, 9), ("last", 1, 9), ("never", 0, 0)]  # each expert ahead of the last
    assert [(x.name, x.calls, x.macs) for x in layers] == reached
