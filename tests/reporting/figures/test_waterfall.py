"""Shares of the predicted error add up."""

from __future__ import annotations

import numpy as np

from lightning_caq.evaluation.shares import ErrorShare
from lightning_caq.reporting.figures.waterfall import error_waterfall


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_waterfall_adds_up_and_sorts() -> None:
    shares = [
        ErrorShare("a", 2, 1.0, 0.5),
        ErrorShare("b", 3, 4.0, None),
        ErrorShare("c", 4, 2.0, 2.5),
        ErrorShare("d", 4, None),
    ]
    figure = error_waterfall(shares)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "c", "a", "all layers"]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 4), (4, 2), (6, 1), (0, 7)]
    observed = np.ma.filled(axes.collections[-1].get_offsets(), np.nan)
    np.testing.assert_allclose(observed[:, 0], [np.nan, 6.5, 6.5])
    assert "1 layers were not measured" in words(figure)
    assert [t.get_text() for t in axes.texts if "%" in t.get_text()] == ["57.1%", "28.6%", "14.3%", "100%"]


def test_waterfall_groups_all_but_the_thirty_largest() -> None:
    figure = error_waterfall([ErrorShare(f"l{i}", 2, float(i + 1)) for i in range(40)])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][-2:] == ["10 other layers", "all layers"]
    assert axes.patches[30].get_width() == sum(range(1, 11))
    assert axes.patches[31].get_width() == sum(range(1, 41))
