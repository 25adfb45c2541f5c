"""What ``quantize`` refuses, and that whatever fails leaves the float network."""

import copy
import random

import nets
import numpy as np
import pytest
import torch
from every import every
from torch import nn

from lightning_caq import quantize
from lightning_caq.errors import BudgetError, CalibrationError, CAQError, LayerError, OptionError

CALIBRATION = nets.images(96, 1)
FAST = {"curvature_samples": 48, "eigenpairs": 8}


def _nan_weight(net):
    net[4].weight[0, 0, 0, 0] = float("nan")


def _inf_weight(net):
    net[10].weight[1, 1] = float("inf")


def _nan_bias(net):
    net[10].bias[0] = float("nan")


BAD_OPTIONS = {
    "no budget": ({"avg_bits": None}, BudgetError, "Got no budget; give exactly one"),
    "two budgets": ({"ratio": 8}, BudgetError, "Got two budgets"),
    "too small": ({"avg_bits": 1.5}, BudgetError, "avg_bits=1.5 cannot be met.*from 2 to 8"),
    "too large": ({"avg_bits": 9}, BudgetError, "avg_bits=9 cannot be met"),
    "ratio too large": ({"avg_bits": None, "ratio": 15.9}, BudgetError, "ratio=15.9 cannot be met.*the most that"),
    "ratio of no bits": ({"avg_bits": None, "ratio": 40}, BudgetError, "ratio=40 cannot be reached.* at most 16 times"),
    "seed": ({"seed": "a"}, OptionError, "seed='a' is not allowed; give a whole number from 0 up"),
    "error of cet": ({"avg_bits": None, "error": 0.05}, BudgetError, "error=0.05 needs a method.*such as 'caq'"),
    "ratio too small": ({"avg_bits": None, "ratio": 1.5}, BudgetError, "ratio=1.5 is already met"),
    "method": (
        {"method": "magic"},
        OptionError,
        "method='magic' is not known; choose from .*'caq', .*'cet', .*'uniform'",
    ),
    "rounding": ({"rounding": "up"}, OptionError, "rounding='up' is not known; choose from 'nearest'"),
    "objective": ({"objective": "l2"}, OptionError, "objective='l2' is not known; choose from 'distill', 'task'"),
    "batchnorm": ({"batchnorm": "no"}, OptionError, "batchnorm='no' is not known"),
    "compare": ({"compare": ["no"]}, OptionError, "compare='no' is not known"),
    "bits": ({"bits": [2, 40]}, OptionError, "bits=.* is not allowed"),
    "no loss": ({"objective": "task", "loss_fn": None}, OptionError, "objective='task' needs loss_fn"),
    "include": ({"include": ["head*"]}, OptionError, r"include pattern 'head\*' matches no layer; the layers are '0'"),
    "exclude": ({"exclude": ["head*"]}, OptionError, r"exclude pattern 'head\*' matches no layer"),
    "nothing left": ({"exclude": ["*"]}, LayerError, "include and exclude leave no layer"),
    "nan loss": (
        {"objective": "task", "loss_fn": lambda m, b: nets.image_loss(m, b) * float("nan")},
        CalibrationError,
        "loss of calibration batch 0 is nan",
    ),
    "late nan loss": (
        {"objective": "task", "loss_fn": lambda m, b: nets.image_loss(m, b) / (0 if len(b[0]) == 56 else 1)},
        CalibrationError,
        "loss of calibration batch 1 is inf",
    ),
    "loss no scalar": ({"objective": "task", "loss_fn": lambda m, b: m(b[0])}, CalibrationError, "must be a scalar"),
}


BAD_BATCHES = {
    "empty": ([], "batches is empty"),
    "one-shot": (iter([CALIBRATION]), "one-shot list_iterator"),
    "no list": (CALIBRATION[0], "put it in a list"),
    "of text": (["text"], "holds no samples"),
    "wrong shape": ([torch.randn(4, 3)], r"Sequential cannot take a calibration batch of float32\[4, 3\]"),
    "wrong type": ([CALIBRATION[0].long()], "cannot take a calibration batch of int64"),
    "nan": ([CALIBRATION[0], CALIBRATION[0] * float("nan")], "batch 1 holds NaN"),
    "huge": ([CALIBRATION[0] * 3e37], "NaN or infinite outputs"),
}


BAD_WEIGHTS = {
    "nan": (_nan_weight, LayerError, "Layer '4' holds NaN or infinite weights"),
    "inf": (_inf_weight, LayerError, "Layer '10' holds NaN or infinite weights"),
    "nan bias": (_nan_bias, CalibrationError, "returns NaN or infinite outputs"),
}


def _refused(net, act, error, message):
    optimizer = torch.optim.Adam(net.parameters())
    before, state = nets.picture(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message) as caught:
        act()
    # NaN is not equal to itself: compare what was stored.
    before["state"] = {k: v.nan_to_num(9e9) for k, v in before["state"].items()}
    after = nets.picture(net)
    after["state"] = {k: v.nan_to_num(9e9) for k, v in after["state"].items()}
    nets.assert_same_picture(before, after)
    assert optimizer.state_dict() == state
    assert isinstance(caught.value, CAQError)
    assert isinstance(caught.value, ValueError)


@every("name", BAD_OPTIONS)
def test_bad_options(net, name):
    options, error, message = BAD_OPTIONS[name]
    calls = []
    kwargs = {"avg_bits": 3, "loss_fn": nets.image_loss, "evaluate": lambda m: calls.append(1) or {}, **FAST, **options}
    _refused(net, lambda: quantize(net, nets.image_batches(), **kwargs), error, message)
    assert not calls  # before any work


@every("name", BAD_BATCHES)
def test_bad_batches(net, name):
    batches, message = BAD_BATCHES[name]
    calls = []
    kwargs = {"avg_bits": 3, "evaluate": lambda m: calls.append(1) or {}, **FAST}
    _refused(net, lambda: quantize(net, batches, **kwargs), CalibrationError, message)
    assert not calls


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(net, name):
    spoil, error, message = BAD_WEIGHTS[name]
    with torch.no_grad():
        spoil(net)
    _refused(net, lambda: quantize(net, nets.image_batches(), avg_bits=3, **FAST), error, message)


def test_networks_without_layers():
    net, x = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), torch.randn(8, 4)
    _refused(net, lambda: quantize(net, [x], avg_bits=3), LayerError, "no layer that can be quantized")
    with pytest.raises(LayerError, match="no layer that can be quantized"):
        quantize(nn.Sequential(nn.ReLU()), [x], avg_bits=3)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_networks():
    with pytest.raises(LayerError, match="Layer '0' is lazy"):
        quantize(nn.Sequential(nn.LazyLinear(4)), [torch.randn(8, 4)], avg_bits=3)


def test_a_quantized_network_is_not_quantized_again(net):
    quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST)
    _refused(net, lambda: quantize(net, nets.image_batches(), avg_bits=3), LayerError, "is quantized already")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_evaluation_that_fails_leaves_the_float_network(net, error, call):
    """After the float network, the quantized one and the compared one."""
    calls = []

    def evaluate(model):
        calls.append(1)
        torch.rand(3), np.random.rand(3), random.random()
        if len(calls) == call:
            raise error("stop")
        return {"acc": 1.0}

    before = nets.picture(net)
    with pytest.raises(error, match="stop"):
        quantize(net, nets.image_batches(), avg_bits=3, evaluate=evaluate, **FAST)
    assert len(calls) == call
    nets.assert_same_picture(before, nets.picture(net))
    quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST)  # and it can be quantized still


@every("call", [1, 3, 8, 20])
def test_a_loss_that_fails_leaves_the_float_network(net, call):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return nets.image_loss(model, batch)

    before = nets.picture(net)
    with pytest.raises(KeyboardInterrupt):
        quantize(net, nets.image_batches(), avg_bits=3, objective="task", loss_fn=loss, **FAST)
    nets.assert_same_picture(before, nets.picture(net))


def test_a_report_that_fails_leaves_the_float_network(net, monkeypatch):
    """The last step, after the modules were swapped."""
    monkeypatch.setattr("lightning_caq.evaluation.run_report.versions", lambda: 1 / 0)
    before = nets.picture(net)
    with pytest.raises(ZeroDivisionError):
        quantize(net, nets.image_batches(), avg_bits=3, compare=(), **FAST)
    nets.assert_same_picture(before, nets.picture(net))


def test_evaluations_must_give_numbers(net):
    before = nets.picture(net)
    with pytest.raises(TypeError):
        quantize(net, nets.image_batches(), avg_bits=3, evaluate=lambda m: {"acc": None}, **FAST)
    nets.assert_same_picture(before, nets.picture(net))


@every("bits", [1, 9, True, "4"])
def test_bits_of_inputs_must_be_whole_numbers_from_2_to_8(net, bits):
    _refused(
        net,
        lambda: quantize(net, nets.image_batches(), avg_bits=3, activation_bits=bits, **FAST),
        OptionError,
        "activation_bits=.* is not allowed; give a whole number from 2 to 8",
    )
