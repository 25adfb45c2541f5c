"""Errors, ratios and what is not known."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_caq.reporting.figures.tightness import tightness_curves
from lightning_caq.studies import Tightness


def test_tightness_holds_errors_and_ratios_and_omits_what_is_unknown() -> None:
    found = {4: Tightness(0.5, 1.5, 1.0, 0.6, 0.5), 2: Tightness(2.0, 8.0, 5.0, 3.0, 2.5)}
    errors, ratios = tightness_curves(found).axes
    drawn = [line.get_xydata().tolist() for line in errors.lines]
    assert drawn == [
        [[2, 8.0], [4, 1.5]], [[2, 5.0], [4, 1.0]], [[2, 3.0], [4, 0.6]], [[2, 2.5], [4, 0.5]], [[2, 2.0], [4, 0.5]],
    ]  # fmt: skip
    np.testing.assert_allclose(ratios.lines[0].get_ydata(), [4, 3])
    assert "Lipschitz" not in " ".join(t.get_text() for t in ratios.get_legend().get_texts())


def test_tightness_of_the_plan_is_drawn_at_its_average_bits() -> None:
    plan = (2.5, Tightness(1.0, 4.0, 3.0, 2.0, 1.5, 50.0))
    errors, ratios = tightness_curves({}, plan).axes
    assert [line.get_xydata().tolist() for line in errors.lines] == [[[2.5, x]] for x in (50, 4, 3, 2, 1.5, 1)]
    assert [line.get_ydata()[0] for line in ratios.lines[:5]] == [50, 4, 3, 2, 1.5]
    with pytest.raises(ValueError, match="not compared"):
        tightness_curves({})
