"""The path through the loss, and losses that are not finite."""

from __future__ import annotations

import math

import pytest

from lightning_caq.reporting.figures.landscape import loss_landscape
from lightning_caq.studies import Landscape


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_landscape_holds_the_path_and_survives_losses_that_are_not_finite() -> None:
    axis = (-1.0, 0.0, 1.0)
    loss = tuple(tuple(math.inf if s == t == 1 else 4 * s * s + t * t for s in axis) for t in axis)
    figure = loss_landscape(Landscape(axis, axis, loss, (8.0, 2.0), ((0, 0), (0.2, 0.1), (0.4, 0.8)), 0.25))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0], [0.2, 0.1], [0.4, 0.8]]
    assert "25% of the whole rounding error's length" in words(figure)
    assert "short axis 8 nat/weight², along the long axis 2 nat/weight²" in words(figure)
    with pytest.raises(ValueError, match="finite"):
        loss_landscape(Landscape(axis, axis, ((math.nan,) * 3,) * 3, (1.0, 1.0)))
