"""Metrics that quantization did not change."""

import copy

import pytest
import torch
from torch import nn

from lightning_caq import quantize

FAST = {"avg_bits": 2, "compare": (), "guard": False, "curvature_samples": 16}
X = torch.randn(60, 6)


class _Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.average = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x)


def _score(network, x=X):
    with torch.no_grad():
        return {"val_loss": float(network(x).square().mean())}


def test_validation_through_a_copy_is_warned_of():
    with pytest.warns(UserWarning, match=r"same metrics to the last digit \(val_loss\).*none of the quantized layers"):
        result = quantize(_Averaged(), [X], evaluate=lambda model: _score(model.average), **FAST)
    assert result.report.notes[0].severity == "warning"


def test_validation_of_the_network_itself_is_not():
    notes = quantize(_Averaged(), [X], evaluate=_score, **FAST).report.notes
    assert not any("last digit" in note for note in notes)


def test_a_coarse_metric_that_is_the_same_is_only_noted():
    def accuracy(model):
        return {"val_acc": float(model(X).shape[0] == 60)}

    notes = quantize(_Averaged(), [X], evaluate=accuracy, **FAST).report.notes
    assert [note.severity for note in notes if "last digit" in note] == ["information"]
