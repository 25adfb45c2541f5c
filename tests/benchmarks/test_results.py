"""The table of results: what it is made of, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    return results


def _result(results, accuracies):
    import ptq

    rows = [
        ptq.Row("resnet20", "cet", "error_feedback", 2.5, 2.49, 12.2, x, 91.5, 40.0, {"rounding (cet)": 9.0}, 900.0, i)
        for i, x in enumerate(accuracies)
    ]
    return results.summary(results.Case("resnet20", 2.5, allowed=0.5, aim=0.0), rows)


def test_mean_standard_error_and_drop_over_seeds(results) -> None:
    found = _result(results, [91.0, 91.2, 91.7])
    assert found.mean == pytest.approx(91.3)
    assert found.stderr == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3))
    assert found.drop == pytest.approx(0.2)
    assert math.isnan(_result(results, [91.0]).stderr)


def test_table_and_json_hold_what_a_reader_needs(results) -> None:
    found = _result(results, [91.0, 91.2, 91.7])
    text = results.as_text([found], [0, 1, 2], "python benchmarks/results.py")
    for words in ("seed 2", "91.30", "0.21", "0.20", "resnet20 91.5 %", "rounding (cet)", "900 MB", "results.py"):
        assert words in text
    (row,) = json.loads(results.as_json([found]))
    assert (row["model"], row["asked_bits"], row["avg_bits"], row["allowed"]) == (
        "resnet20",
        2.5,
        2.49,
        0.5,
    )


def test_every_case_is_one_that_can_be_run(results) -> None:
    from lightning_caq.options import QuantizationOptions

    for case in results.CASES:
        QuantizationOptions(avg_bits=case.asked_bits, bits=case.bits, activation_bits=case.inputs)
    assert {case.model for case in results.CASES} == {"resnet20", "resnet32"}
