"""Curvature over the epochs, a line a layer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_caq.reporting.figures.training import training_curves
from lightning_caq.studies import EpochCurvature


def test_training_holds_a_line_a_layer_and_a_panel_a_measure() -> None:
    kappa, trace = {"a": (3.0, 2.0, 1.0), "b": (5.0, math.nan, 7.0)}, {"a": (0.1, 0.2, 0.4), "b": (0.0, -1.0, math.inf)}
    epochs = [
        EpochCurvature(
            2 * i, {f"kappa/{n}": v[i] for n, v in kappa.items()} | {f"trace/{n}": v[i] for n, v in trace.items()}
        )
        for i in range(3)
    ]
    first, second = training_curves(epochs).axes
    assert (first.get_yscale(), second.get_yscale()) == ("log", "log")
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["κ (out²/in²)", "trace (nat/weight²)"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[0, 3], [2, 2], [4, 1]])
    np.testing.assert_array_equal(first.lines[1].get_ydata(), [5, math.nan, 7])
    np.testing.assert_array_equal(second.lines[0].get_ydata(), [0.1, 0.2, 0.4])
    assert np.isnan(second.lines[1].get_ydata()).all()  # a logarithmic axis has no place for them
    assert [t.get_text() for t in second.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="monitor_every_n_epochs"):
        training_curves([])


def test_training_colours_many_layers_by_their_place() -> None:
    figures = {f"{measure}/l{i}": 1.0 + i for measure in ("kappa", "lipschitz", "trace") for i in range(20)}
    figure = training_curves([EpochCurvature(0, figures)])
    *panels, bar = figure.axes
    assert [len(axes.lines) for axes in panels] == [20, 20, 20]
    assert [t.get_text() for t in bar.get_yticklabels()] == ["l0", "l19"]
    lightness = [np.dot(line.get_color()[:3], (0.2126, 0.7152, 0.0722)) for line in panels[0].lines]
    assert lightness == sorted(lightness)
