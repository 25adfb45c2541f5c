from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_caq.evaluation.sweep import eigenpair_sweep, mean_points, sweep_points
from lightning_caq.report import QuantizationReport, Size
from lightning_caq.studies import SweepPoint


def make_report(k: int = 64) -> QuantizationReport:
    sizes = {"float": Size(32.0, 1.0, 9), "quantized": Size(2.9, 10.0, 1), "uniform": Size(3.0, 9.0, 1)}
    metrics = {"float/acc": 0.9, "quantized/acc": 0.8 + k / 1000, "uniform/a/b": 0.5}
    return QuantizationReport("cet", "avg_bits=3", (), sizes, metrics, options={"eigenpairs": k})


def test_a_report_gives_its_quantized_networks() -> None:
    chosen, other = sweep_points(make_report())
    assert (chosen.method, chosen.avg_bits, chosen.chosen, chosen.eigenpairs) == ("cet", 2.9, True, 64)
    assert (other.method, other.metrics, other.chosen) == ("uniform", {"a/b": 0.5}, False)


def test_means_and_standard_errors_are_those_of_numpy() -> None:
    values = np.random.default_rng(0).normal(size=7)
    points = [SweepPoint("cet", 3.0 + 1e-4 * i, 10.0, {"acc": x}) for i, x in enumerate(values)]
    (found,) = mean_points(points)
    assert found.metrics["acc"] == pytest.approx(values.mean())
    assert found.stderr["acc"] == pytest.approx(values.std(ddof=1) / 7**0.5)


def test_other_methods_bits_and_eigenpairs_are_points_of_their_own() -> None:
    points = [SweepPoint("a", 3.0, 1, {}), SweepPoint("b", 3.0, 1, {}), SweepPoint("a", 3.2, 1, {}),
              SweepPoint("a", 3.0, 1, {}, eigenpairs=8)]  # fmt: skip
    assert mean_points(points) == tuple(points)


def test_nan_and_missing_metrics_are_left_out_of_the_mean() -> None:
    points = [SweepPoint("a", 3.0, 1, x) for x in ({"m": 1.0}, {"m": math.nan}, {"m": 3.0}, {}, {"n": math.nan})]
    (found,) = mean_points(points)
    assert found.metrics == {"m": 2.0}
    assert found.stderr == {"m": pytest.approx(1.0)}


def test_eigenpair_sweep_runs_once_a_count() -> None:
    asked: list[int] = []

    def run(k: int) -> QuantizationReport:
        asked.append(k)
        return make_report(k)

    points = eigenpair_sweep(run, (200, 50))
    assert asked == [200, 50]
    assert [(p.eigenpairs, p.metrics["acc"]) for p in points] == [(200, pytest.approx(1.0)), (50, pytest.approx(0.85))]
