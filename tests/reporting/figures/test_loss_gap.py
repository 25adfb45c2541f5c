"""Predicted against observed, inside and outside the radius."""

from __future__ import annotations

import pytest

from lightning_caq.evaluation.loss_gap import LossGap
from lightning_caq.reporting.figures.loss_gap import loss_gap


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_loss_gap_tells_inside_from_outside_and_ends_bars_at_the_radius() -> None:
    gaps = [
        LossGap("a", 2, 4.0, 1.0, 3.0, True),
        LossGap("a", 3, 2.0, 0.25, 0.3, False),
        LossGap("a", 4, 1.0, 0.06, None, False),
        LossGap("b", 2, 8.0, 0.1, -0.02, True),
    ]
    figure = loss_gap(gaps)
    scatter, rows = figure.axes
    assert scatter.collections[0].get_offsets().tolist() == [[0.25, 0.3]]
    assert scatter.collections[1].get_offsets().tolist() == [[1.0, 3.0], [0.1, -0.02]]
    assert "2 of 3 measured changes are outside" in words(figure)
    (bar,) = rows.patches
    assert bar.get_x() + bar.get_width() == pytest.approx(2.0)
    assert [(t.get_text(), t.get_position()) for t in rows.texts] == [
        ("2", (4.0, 0)), ("3", (2.0, 0)), ("4", (1.0, 0)), ("2", (8.0, 1)),
    ]  # fmt: skip
    low, high = scatter.get_ylim()
    assert low < -0.02 < 3 < high
