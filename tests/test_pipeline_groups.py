"""Scales of groups down the whole road: options, rounding, modules, plan, packed file, ONNX."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import export_onnx, load_quantized, quantize, save_quantized
from lightning_caq.errors import ExportError, OptionError
from lightning_caq.export.sealed import read_sealed
from lightning_caq.options import QuantizationOptions
from lightning_caq.plan import QuantizationPlan
from lightning_caq.quantizers.fake_quant.learning import learning_scales
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules

SIZE = 32


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 48)
        self.conv, self.up = nn.Conv1d(48, 16, 3, padding=1, bias=False), nn.ConvTranspose1d(16, 40, 2, stride=2)
        self.norm, self.mix, self.classes = nn.LayerNorm(40), nn.Linear(40, 70), nn.Linear(70, 5)

    def forward(self, text):
        x = self.up(self.conv(self.words(text).transpose(1, 2)).relu()).transpose(1, 2)
        return self.classes(self.mix(self.norm(x)).relu())


def _batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(20, (32, 6), generator=draw) for _ in range(3)]


def _quantized(net=None, **options):
    arguments = {"method": "uniform", "avg_bits": 3, "bits": (3,), "compare": (), "guard": False, "group_size": SIZE}
    return quantize(net or _Net().eval(), _batches(), **(arguments | options))


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def done(request):
    return _quantized(scale_dtype=request.param)


def test_every_layer_has_a_scale_a_group_but_transposed_convolutions(done):
    shapes = {x.name: tuple(x.grid.scale.shape) for x in done.plan.layers}
    assert shapes == {
        "words": (20, 1, 2), "conv": (16, 1, 1, 5), "up": (1, 40, 1), "mix": (70, 1, 2), "classes": (5, 1, 3),
    }  # fmt: skip
    assert any("Transposed convolutions keep one scale a channel" in str(note) for note in done.report.notes)


def test_weights_lie_on_the_grids_of_their_groups(done):
    weight, grid = done.model.mix.weight.detach(), rounding_state(done.model.mix).grid
    for g, piece in enumerate(weight.split(SIZE, 1)):
        codes = piece / grid.scale[..., g].float() + grid.zero_point[..., g]
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert bool(((codes > -0.5) & (codes < 7.5)).all())


def test_the_file_holds_the_bytes_that_are_counted(done, tmp_path):
    path = save_quantized(done.model, tmp_path / "net.safetensors")
    parts = {"codes", "scale", "zero_points", "doubled_zero_point"}
    _, stored = read_sealed(path)
    assert sum(x.nbytes for name, x in stored.items() if name.rpartition(".")[2] in parts) == done.plan.bytes
    sizes = done.plan.sizes
    width = {"float32": 32, "float16": 16, "bfloat16": 16}[str(done.plan.layers[0].grid.scale.dtype)[6:]]
    groups = 20 * 2 + 16 * 5 + 70 * 2 + 5 * 3
    scales = (groups + 40) * width
    assert sizes.overhead == scales + 40 * 16
    assert abs(sizes.tables([3] * 5) - groups * 4) < 8 * 4  # zero points of four bits, in whole bytes
    assert done.plan.ratio == pytest.approx(32 * sum(sizes.weights) / (8 * done.plan.bytes), rel=1e-3)


def test_files_and_plans_give_the_same_network_to_the_last_bit(done, tmp_path):
    text = _batches()[0]
    expected = done.model(text)
    path = save_quantized(done.model, tmp_path / "net.safetensors")
    for packed in (False, True):
        loaded = load_quantized(_Net().eval(), path, packed=packed)
        assert torch.equal(loaded(text), expected)
        assert torch.equal(copy.deepcopy(loaded)(text), expected)
    plan = QuantizationPlan.load(done.plan.save(tmp_path / "plan"))
    net = _Net().eval()
    plan.apply(net)
    assert torch.equal(net(text), expected)
    assert (plan.ratio, plan.bytes) == (done.plan.ratio, done.plan.bytes)
    assert json.loads((tmp_path / "plan.json").read_text())["layers"][0]["group_size"] == SIZE


def test_onnx_holds_the_very_weights_in_blocks(done, tmp_path):
    text = _batches()[0]
    export = export_onnx(done.model, tmp_path / "net.onnx", text)
    assert export.difference < 1e-5
    proto = onnx.load(export.path)
    names = {x.name for x in proto.graph.initializer}
    blocks = {
        node.input[0].removesuffix(".codes"): {x.name: x.i for x in node.attribute}
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear"
    }
    assert {k: x.get("block_size") for k, x in blocks.items()} == {
        f"{name}.weight": None if name == "up" else SIZE for name in ("words", "conv", "up", "mix", "classes")
    }
    for node in [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]:
        key = node.input[0].removesuffix(".codes")
        small = onnx.helper.make_graph(
            [node],
            "weight",
            [],
            [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
            [x for x in proto.graph.initializer if x.name in node.input and x.name in names],
        )
        payload = onnx.helper.make_model(small, opset_imports=proto.opset_import, ir_version=10).SerializeToString()
        (found,) = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"]).run(None, {})
        weight = done.model.get_parameter(key).detach().numpy()
        assert np.array_equal(found.reshape(weight.shape), weight)


def test_onnx_before_there_were_blocks(done, tmp_path):
    with pytest.raises(ExportError, match=r"block_size.*opset 21"):
        export_onnx(done.model, tmp_path / "net.onnx", _batches()[0], opset=20)


@every("rounding", ["nearest", "error_feedback", "long_axis"])
def test_smaller_groups_are_nearer_with_every_rounding(rounding):
    text, errors = torch.cat(_batches()), []
    for group_size in (None, 32):
        done = _quantized(rounding=rounding, group_size=group_size, avg_bits=2, bits=(2,), eigenpairs=4)
        with torch.no_grad():
            errors.append(float((done.model(text) - _Net().eval()(text)).norm()))
    assert errors[1] < errors[0]


@every("options", [{"symmetry": "symmetric"}, {"symmetry": "mid_rise", "bits": (8,), "avg_bits": 8}, {"range": "aciq"}])
def test_other_ways_to_choose_a_grid(options, tmp_path_factory):
    done, text = _quantized(**options), _batches()[0]
    path = save_quantized(done.model, tmp_path_factory.mktemp("file") / "net.safetensors")
    assert torch.equal(load_quantized(_Net().eval(), path)(text), done.model(text))


def test_rounded_inputs_and_curvature_ranges_go_with_groups():
    done = _quantized(activation_bits=8, range="curvature", scale_dtype="bfloat16")
    assert all(rounding_state(x).grid.scale.dtype == torch.bfloat16 for x in quantized_modules(done.model).values())
    assert bool(done.model(_batches()[0]).isfinite().all())


def test_a_ratio_is_kept_with_zero_points_that_grow_with_the_bits():
    done = _quantized(method="mckp", avg_bits=None, ratio=7.5, bits=(2, 3, 4, 8), scale_dtype="float16")
    weights = 4 * sum(done.plan.sizes.weights)
    assert 7.5 <= weights / done.plan.bytes < 9


def test_pruned_weights_stay_zero():
    net = _Net().eval()
    zeros = torch.rand(70, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        net.mix.weight.masked_fill_(zeros, 0.0)
    done = _quantized(net, avg_bits=2, bits=(2,))
    assert not done.model.mix.weight[zeros].any()


@every("scale_dtype", ["float32", "float16"])
def test_scales_of_groups_are_learned(scale_dtype):
    done, text = (
        _quantized(scale_dtype=scale_dtype, range="minmax", rounding="nearest", bits=(2,), avg_bits=2),
        _batches()[0],
    )
    with torch.no_grad():
        target = _Net().eval()(text)
        before = float((done.model(text) - target).square().mean())
    with learning_scales(done.model):
        factors = [x for name, x in done.model.named_parameters() if name.endswith("scale_factor")]
        assert done.model.mix._lightning_caq_scale_factor.shape == (70, 1, 2)
        optimizer = torch.optim.Adam(factors, 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            (done.model(text) - target).square().mean().backward()
            optimizer.step()
        plan = done.plan.settled(done.model)
    with torch.no_grad():
        assert float((done.model(text) - target).square().mean()) < 0.8 * before
    old, new = (next(x.grid.scale for x in p.layers if x.name == "mix") for p in (done.plan, plan))
    assert old.dtype == new.dtype == getattr(torch, scale_dtype)
    assert not torch.equal(old[..., 0] / old[..., 1], new[..., 0] / new[..., 1])  # those of a channel learn apart


def test_a_state_dict_is_that_of_the_float_network(done):
    assert list(done.model.state_dict()) == list(_Net().state_dict())
    fresh = _Net().eval()
    fresh.load_state_dict(done.model.state_dict())
    assert torch.equal(fresh(_batches()[0]), done.model(_batches()[0]))


REFUSED = [
    ({"group_size": 48}, "group_size=48 is not allowed; choose from 32, 64, 128, or None"),
    ({"group_size": True}, "group_size=True is not allowed"),
    ({"group_size": 64, "quantizer": "codebook"}, "group_size=64 is for quantizer='affine'"),
    ({"scale_dtype": "float16", "quantizer": "lq_nets"}, "scale_dtype='float16' is for quantizer='affine'"),
    ({"group_size": 64, "coding": "entropy"}, "group_size=64 is for bit-widths"),
    ({"scale_dtype": "bfloat16", "coding": "entropy"}, "scale_dtype='bfloat16' is for bit-widths"),
    ({"group_size": 64, "granularity": "channel_group"}, "group_size=64 is for granularity='layer'"),
    ({"scale_dtype": "float64"}, "scale_dtype='float64' is not known; choose from"),
]


@every(("options", "message"), REFUSED)
def test_what_does_not_go_together(options, message):
    with pytest.raises(OptionError, match=message):
        QuantizationOptions(avg_bits=3, **options)


def test_weights_that_float16_scales_cannot_hold_leave_the_network_alone():
    net = _Net().eval()
    with torch.no_grad():
        net.mix.weight.mul_(1e-6)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(OptionError, match="cannot hold the scales of 'mix'"):
        _quantized(net, scale_dtype="float16")
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
