"""Eigenpairs in their order."""

from __future__ import annotations

import numpy as np

from lightning_caq.reporting.figures.eigenpairs import eigenpair_curve
from lightning_caq.studies import SweepPoint


def test_eigenpairs_are_in_order_on_the_axis() -> None:
    points = [SweepPoint("cet", 3.0, 10.0, {"loss": 1 / k}, eigenpairs=k) for k in (200, 50, 100)]
    (axes,) = eigenpair_curve(points, {"loss": 0.001}).axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[50, 1 / 50], [100, 1 / 100], [200, 1 / 200]])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["50", "100", "200"]
