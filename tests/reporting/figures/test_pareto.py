"""Points, error bars and the float line of the budget sweep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from lightning_caq.reporting.figures.pareto import pareto
from lightning_caq.studies import SweepPoint


def test_pareto_holds_a_curve_a_method_with_error_bars_and_the_float_line() -> None:
    points = [SweepPoint("cet", 2.0, 16.0, {"acc": x}) for x in (0.7, 0.8, 0.9)]
    points += [SweepPoint("cet", 4.0, 8.0, {"acc": 0.9}, chosen=True), SweepPoint("uniform", 3.0, 10.0, {"acc": 0.6})]
    (axes,) = pareto(points, {"acc": 0.95}).axes
    bars = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    np.testing.assert_allclose(bars["cet"].lines[0].get_xydata(), [[2, 0.8], [4, 0.9]])
    (whisker, point) = bars["cet"].lines[2][0].get_segments()
    np.testing.assert_allclose(whisker[:, 1], [0.8 - 0.1 / 3**0.5, 0.8 + 0.1 / 3**0.5])
    np.testing.assert_allclose(point[:, 1], 0.9)
    np.testing.assert_allclose(bars["uniform"].lines[0].get_xydata(), [[3, 0.6]])
    assert axes.lines[0].get_ydata() == [0.95, 0.95]
    rings = [line for line in axes.lines if line.get_markersize() > 10]
    assert [ring.get_xydata().tolist() for ring in rings] == [[[4, 0.9]]]
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"cet", "uniform", "float, 0.95"}


def test_pareto_leaves_out_what_has_no_metric_and_refuses_to_draw_nothing() -> None:
    points = [SweepPoint("cet", 2.0, 16.0, {"acc": math.nan}), SweepPoint("uniform", 2.0, 16.0, {"acc": 0.5})]
    (axes,) = pareto(points, {}).axes
    assert [c.get_label() for c in axes.containers] == ["uniform"]
    with pytest.raises(ValueError, match="finite value"):
        pareto(points[:1], {})


def test_pareto_of_one_size_keeps_its_points_together_and_apart_from_each_other() -> None:
    points = [SweepPoint(name, 2.5 + i / 1000, 12.0, {"acc": 0.9}) for i, name in enumerate(("cet", "uniform", "caq"))]
    (axes,) = pareto(points, {}).axes
    low, high = axes.get_xlim()
    assert low < 2.1 < 2.9 < high  # thousandths of a bit are no distance
    sizes = [c.lines[0].get_markersize() for c in axes.containers]
    assert sizes == sorted(set(sizes), reverse=True)  # none hides one that was drawn before
