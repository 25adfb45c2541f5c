"""What is deployed, and what of it stays in floating point."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import OptionError
from lightning_caq.network.deployed import find_deployed, reached, stored_widths
from lightning_caq.network.float_notes import float_notes
from lightning_caq.network.layers import find_layers

FAST = {"compare": (), "guard": False, "curvature_samples": 16}


class _Uses(nn.Module):
    """Weights that are used in every way, and those that are not."""

    def __init__(self):
        super().__init__()
        make = lambda: nn.Parameter(torch.randn(4, 4))  # noqa: E731
        self.called, self.by_function, self.by_forward = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.raw, self.turned, self.in_list = make(), make(), nn.ParameterList([make(), make()])
        self.recurrent, self.attention = nn.GRU(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.teacher, self.idle = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.ModuleDict({"x": nn.Linear(4, 4)})
        self.shape_only = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])

    def forward(self, x):
        x = self.by_forward.forward(F.linear(self.called(x), self.by_function.weight))
        x = x @ self.raw @ self.turned.T @ self.in_list[1].data
        x = self.scripted(x[:, None, : self.shape_only[0].shape[0]])
        x = self.recurrent(x)[0]
        return self.attention(x, x, x)[0][:, 0]


def test_what_a_batch_reaches():
    net, x = _Uses().eval(), torch.randn(3, 4)
    found = reached(net, [x])
    names = {name for name, p in net.named_parameters() if id(p) not in found and p.ndim > 1}
    assert names == {"in_list.0", "teacher.0.weight", "teacher.1.weight", "idle.x.weight", "shape_only.0"}
    assert not net._forward_pre_hooks
    assert not net.called._forward_pre_hooks


def test_a_layer_that_only_a_later_batch_reaches_is_deployed():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    net, batches = Routed(), [torch.ones(2, 4), -torch.ones(2, 4)]
    deployed = find_deployed(net, find_layers(net, batches[0]), batches)
    assert ([x.name for x in deployed.layers], deployed.outside) == (["a"], ())
    assert [(part.name, part.weights) for part in deployed.left] == [("b.weight", 8)]


def test_parts_are_named_by_what_holds_them():
    net, x = _Uses().eval(), torch.randn(3, 4)
    nn.utils.parametrizations.weight_norm(net.called)
    deployed = find_deployed(net, find_layers(net, x, exclude=["by_forward"]), [x])
    assert {(part.name, part.weights, part.kind) for part in deployed.left} == {
        ("recurrent", 96, "GRU"),
        ("attention.in_proj_weight", 48, "MultiheadAttention"),
        ("attention.out_proj.weight", 16, "NonDynamicallyQuantizableLinear"),
        ("called.weight", 20, "parametrized"),
        ("raw", 16, ""),
        ("turned", 16, ""),
        ("in_list.1", 16, ""),
        ("by_function.weight", 16, "Linear"),
        ("scripted.0.weight", 16, ""),
    }
    assert [part.name for part in deployed.excluded] == ["by_forward.weight"]


def test_patterns_say_what_is_deployed():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Linear(4, 2)

        def forward(self, x):
            return self.student(x) - self.teacher(x)

    net, x = Pair(), torch.randn(40, 4)
    for patterns, count in ((None, 3), (["student"], 2), (["student.*"], 2), (["*.0.weight", "teacher"], 2)):
        deployed = find_deployed(net, find_layers(net, x), [x], patterns=patterns)
        assert len(deployed.layers) == count
        assert deployed.weights == sum(layer.weights for layer in deployed.layers)
    before = net.teacher.weight.detach().clone()
    result = quantize(net, [x], avg_bits=3, deployed=["student"], **FAST)
    assert torch.equal(net.teacher.weight, before)
    assert any("teacher" in note and "not counted" in note for note in result.report.notes)
    with pytest.raises(OptionError, match=r"deployed pattern 'studnt' matches no parameter or module.*'student'"):
        quantize(Pair(), [x], avg_bits=3, deployed=["studnt"], **FAST)


def test_everything_can_be_counted():
    net = nn.ModuleDict({"net": nn.Linear(8, 4), "teacher": nn.Linear(8, 400)})
    net.forward = lambda x: net["net"](x)
    with pytest.warns(UserWarning, match=r"^caq: 99 % of the weights stay in float32: teacher.weight"):
        result = quantize(net, [torch.randn(40, 8)], avg_bits=3, deployed=["*"], **FAST)
    assert result.plan.ratio < 1.1


def test_notes_have_shares_and_a_severity():
    net, x = _Uses().eval(), torch.randn(3, 4)
    loud, asked, outside = float_notes(find_deployed(net, find_layers(net, x, exclude=["by_forward"]), [x]))
    assert (loud.severity, asked.severity, outside.severity) == ("warning", "information", "information")
    assert loud.startswith("88 % of the weights stay in float32: recurrent (35 %, GRU), attention.in_proj_weight (18 %")
    assert "as include and exclude ask: by_forward.weight (5.9 %" in asked or "by_forward.weight (6 %" in asked
    assert "in_list, teacher, idle, shape_only" in outside
    small = nn.Sequential(nn.Linear(100, 100))
    small.register_parameter("token", nn.Parameter(torch.zeros(1, 10)))
    (note,) = float_notes(find_deployed(small, find_layers(small, torch.zeros(1, 100)), [torch.zeros(1, 100)]))
    assert (note.severity, str(note)) == ("information", "0.1 % of the weights stay in float32: token (0.1 %).")


def test_half_precision_has_both_ratios():
    for dtype, times in ((torch.bfloat16, 2), (torch.float16, 2), (torch.float32, None)):
        net, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype), torch.randn(40, 8).to(dtype)
        assert set(stored_widths(net).values()) == {torch.finfo(dtype).bits}
        report = quantize(net, [x], avg_bits=4, **FAST).report
        size = report.sizes["quantized"]
        if times is None:
            assert size.memory_ratio is None
        else:
            assert size.ratio == pytest.approx(times * size.memory_ratio)
            assert "ratio to memory" in report.table()


def test_the_ratio_to_memory_counts_float_parts_in_their_own_type():
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    result = quantize(net, [torch.randn(40, 8).bfloat16()], avg_bits=4, exclude=["2"], **FAST)
    kept, scales = 128 * 16, 32 * 48
    assert result.plan.memory_ratio == pytest.approx((256 * 16 + kept) / (256 * 4 + scales + kept))
    assert result.plan.bytes == (256 * 4 + scales + kept) // 8
