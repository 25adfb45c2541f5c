"""What outputs are taken for, and why."""

import pytest
import torch
import torch.nn.functional as F
from every import every
from torch import nn

from lightning_caq.errors import OptionError
from lightning_caq.network.meaning import Evidence, meaning_of, torchmetrics_of
from lightning_caq.network.observe import observe

Z = torch.randn(6, 4)
TOKENS, PIXELS = torch.randn(6, 5, 4), torch.randn(6, 4, 3, 3)
LONG = torch.zeros(6).long()


def _meaning(tensor, *, path=(), output="auto", class_axis=None, alone=True, axis=0, **evidence):
    known = Evidence(**evidence)
    return meaning_of(path, tensor, axis, output=output, class_axis=class_axis, evidence=known, alone=alone)


def _kind(tensor, **known):
    return _meaning(tensor, **known)[0].kind


def _losses(loss):
    return observe(nn.Identity(), Z, loss).losses


@every(
    ("tensor", "known", "kind"),
    [
        (Z, {}, "classes"),
        (Z[:, :1], {}, "values"),
        (Z[:, 0], {}, "values"),
        (Z, {"labels": {(1,): LONG}}, "classes"),
        (Z, {"labels": {(1,): torch.randn(6, 4)}}, "values"),
        (Z, {"inputs": {(0,): torch.randn(6, 4)}}, "values"),
        (Z, {"inputs": {(0,): torch.randn(6, 4)}, "labels": {(1,): LONG}}, "classes"),
        (Z, {"losses": _losses(lambda m, z: F.cross_entropy(m(z), LONG))}, "classes"),
        (Z, {"losses": _losses(lambda m, z: F.nll_loss(m(z).log_softmax(1), LONG))}, "classes"),
        (Z, {"losses": _losses(lambda m, z: F.mse_loss(m(z), z)), "labels": {(1,): LONG}}, "values"),
        (Z, {"losses": _losses(lambda m, z: F.binary_cross_entropy_with_logits(m(z), z.sigmoid()))}, "values"),
        (Z, {"metrics": ["regression.MeanSquaredError"]}, "values"),
        (Z, {"metrics": ["classification.MulticlassAccuracy"]}, "classes"),
        (Z, {"metrics": ["classification.MultilabelAccuracy"]}, "values"),
        (Z, {"path": ("logits",), "alone": False}, "classes"),
        (Z, {"path": ("pooler_output",), "alone": False}, "values"),
        (Z, {"output": "values"}, "values"),
        (Z, {"output": "classes", "labels": {(1,): torch.randn(6, 4)}}, "classes"),
    ],
)
def test_kinds(tensor, known, kind):
    assert _kind(tensor, **known) == kind


@every(
    ("tensor", "known", "axis"),
    [
        (Z, {}, 1),
        (TOKENS, {}, 2),
        (PIXELS, {}, 1),
        (TOKENS.transpose(1, 2), {"labels": {(1,): torch.zeros(6, 5).long()}}, 1),  # segmentation along a line
        (TOKENS, {"labels": {(1,): torch.zeros(6, 5).long()}}, 2),
        (PIXELS.movedim(1, -1), {"labels": {(1,): torch.zeros(6, 3, 3).long()}}, 3),
        (TOKENS, {"class_axis": 1}, 1),
        (PIXELS, {"class_axis": -1}, 3),
    ],
)
def test_class_axes(tensor, known, axis):
    assert _meaning(tensor, **known)[0].class_axis == axis


def test_the_reason_is_given():
    assert "labels are floating-point" in _meaning(Z, labels={(1,): torch.randn(6, 4)})[1]
    assert "the loss is mse_loss" in _meaning(Z, losses=_losses(lambda m, z: F.mse_loss(m(z), z)))[1]
    assert "nothing says otherwise" in _meaning(Z)[1]


@every("class_axis", [2, -3, 0])
def test_an_axis_that_cannot_be_that_of_classes(class_axis):
    with pytest.raises(OptionError, match=f"class_axis={class_axis} is no axis of classes"):
        _meaning(Z, class_axis=class_axis)


@every(
    ("name", "mask", "keep"),
    [
        ("attention_mask", torch.tensor([[1, 1, 0]]), [[True, True, False]]),
        ("mask", torch.tensor([[1.0, 0.0, 0.0]]), [[True, False, False]]),
        ("src_key_padding_mask", torch.tensor([[False, False, True]]), [[True, True, False]]),
    ],
)
def test_masks_are_known_by_their_names(name, mask, keep):
    head, _ = _meaning(torch.randn(1, 3, 4), inputs={(1,): mask}, names={(1,): name})
    assert head.masks[0].keep(mask).tolist() == keep


def test_what_is_no_mask():
    for name, mask in (("x", torch.ones(1, 3)), ("attention_mask", torch.ones(1, 3, 3)), ("mask", torch.randn(1, 3))):
        head, _ = _meaning(torch.randn(1, 3, 4), inputs={(1,): mask}, names={(1,): name})
        assert not head.masks


def test_labels_of_minus_100_leave_positions_out():
    labels = torch.tensor([[3, -100, 1]])
    head, _ = _meaning(torch.randn(1, 3, 4), labels={("y",): labels})
    assert head.masks[0].keep(labels).tolist() == [[True, False, True]]


def test_metrics_are_found_among_the_modules():
    torchmetrics = pytest.importorskip("torchmetrics")
    net = nn.Sequential(nn.Linear(1, 1), torchmetrics.MeanSquaredError())
    assert torchmetrics_of(net) == ["regression.MeanSquaredError"]
