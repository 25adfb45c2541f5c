"""What the bars of curvature hold and say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from readable import assert_readable

from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.reporting.figures.curvature import curvature_bars

METRICS = {
    "float/val_loss": 0.31,
    "float/val_acc": 0.915,
    "quantized/val_loss": 0.32,
    "quantized/val_acc": 0.9171,
    "uniform/val_acc": 0.885,
}


MANY = [f"stage{1 + i // 20}.{i}.conv" for i in range(60)]


LONG = [f"{'module.' * 14}{i}.{'x' * 20}" for i in range(5)]


SIZES = pytest.mark.parametrize(
    "layers", [["fc"], MANY[:4], MANY[:20], MANY, LONG], ids=["1", "4", "20", "60", "long names"]
)


@SIZES
def test_curvature_is_readable(layers, make_report, make_profile) -> None:
    assert_readable(curvature_bars(make_report(layers, METRICS), make_profile(layers)))


@SIZES
def test_curvature_holds_kappa_tolerance_and_bits(layers, make_report, make_profile) -> None:
    report = make_report(layers)
    figure = curvature_bars(report, make_profile(layers))
    bars, points = figure.axes[: len(figure.axes) // 2], figure.axes[len(figure.axes) // 2 :]
    widths = [patch.get_width() for axes in bars for patch in axes.patches]
    assert widths == pytest.approx([2.0**i for i in range(len(layers))])
    assert all(axes.get_xscale() == "log" for axes in bars)
    offsets = np.vstack([axes.collections[0].get_offsets() for axes in points])
    assert offsets[:, 0].tolist() == [row.bits["quantized"] for row in report.layers]
    numbers = [t.get_text() for axes in points for t in axes.texts]
    assert numbers == [str(row.bits["quantized"]) for row in report.layers]
    whiskers = [segment for axes in bars for segment in axes.containers[1].lines[2][0].get_segments()]
    assert [s[:, 0].tolist() for s in whiskers] == [
        pytest.approx([0.9 * 2.0**i, 1.1 * 2.0**i]) for i in range(len(layers))
    ]
    assert all(axes.get_xlim() == bars[0].get_xlim() for axes in bars)


def test_missing_zero_and_nan_curvature_is_said_in_words(make_report) -> None:
    rows = (
        LayerCurvature("a", 1, 1, 1, kappa=0.0),
        LayerCurvature("b", 1, 1, 1, kappa=math.nan),
        LayerCurvature("c", 1, 1, 1),
        LayerCurvature("d", 1, 1, 1, kappa=5.0),
    )
    figure = curvature_bars(make_report(["a", "b", "c", "d", "e"]), CurvatureProfile(rows))
    words = [t.get_text() for t in figure.axes[0].texts]
    assert words == ["κ is 0", "κ not measured", "κ not measured", "κ not measured"]
    assert_readable(figure)


def test_nothing_measured_still_draws_the_bits(make_report) -> None:
    figure = curvature_bars(make_report(MANY[:4]), CurvatureProfile(()))
    assert [t.get_text() for t in figure.axes[1].texts] == ["2", "3", "4", "5"]
    assert_readable(figure)


def test_rank_correlation_is_stated(make_report, make_profile) -> None:
    def caption(layers: list[str]) -> str:
        return " ".join(curvature_bars(make_report(layers), make_profile(layers)).texts[1].get_text().split())

    assert "over 6 layers: +1.00" in caption(MANY[:6])  # κ and bits both rise from layer to layer
    assert "correlation" not in caption(MANY[:2])


def test_equal_bits_are_stated_instead_of_a_correlation(make_report, make_profile) -> None:
    report = make_report(MANY[:4])
    same = replace(report, layers=tuple(replace(row, bits={"quantized": 3, "uniform": 3}) for row in report.layers))
    caption = curvature_bars(same, make_profile(MANY[:4])).texts[1].get_text()
    assert "Every layer has the same bits." in " ".join(caption.split())
