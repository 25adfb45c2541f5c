from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = ["task", "kind", "layers", "seconds", "worst_seconds", "per_linear_program", "gap"]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_rows_of_small_tables(capsys: pytest.CaptureFixture[str]) -> None:
    import allocation as benchmark

    tiny = ["--layers", "6", "--seeds", "2", "--rounds", "1", "--two-limits"]
    benchmark.main([*tiny, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [KEYS] * 5 * 3
    for row in rows:
        assert 0 < row["seconds"] <= row["worst_seconds"]
        assert row["layers"] == 6
        if row["task"] == "linear program":
            assert row["per_linear_program"] == 1
        if row["task"].startswith("optimum"):
            assert 0 <= row["gap"] < 1e-5
    benchmark.main([*tiny, "--kinds", "wide"])
    text = capsys.readouterr().out
    for words in ("optimum under a size", "frontier", "slowest", "cores", "3 bits on average"):
        assert words in text


def test_the_linear_program_is_a_bound() -> None:
    import allocation as benchmark

    costs, weights, _ = benchmark.make_table(30, "network", 0)
    size = benchmark.size_limit(weights, benchmark.BITS, 3.0 * sum(weights))
    found = benchmark.solve(costs, benchmark.BITS, [size])
    assert benchmark.linear_program(costs, size) * costs.max() <= found.cost * (1 + 1e-9)
