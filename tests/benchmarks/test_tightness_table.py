from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data"
KEYS = ["model", "layers", "bits", "observed", "bound", "correlated", "rss", "linear", "lipschitz", "seconds", "seed"]

needs_data = pytest.mark.skipif(not (DATA / "mnist_20k.npz").is_file(), reason=f"the benchmark's data is not in {DATA}")


def tightness(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/tightness.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@needs_data
def test_mlp2_is_as_tight_as_asked() -> None:
    done = tightness("--model", "mlp2", "--bits", "2", "4", "8", "--samples", "64", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [list(row) for row in rows] == [KEYS] * 3
    assert [(row["model"], row["layers"], row["bits"]) for row in rows] == [("mlp2", 2, b) for b in (2, 4, 8)]
    for row in rows:
        assert 1 <= row["correlated"] <= row["bound"] < 4
        assert 1 / 1.5 < row["rss"] < 1.5
        assert 1 / 1.25 < row["linear"] < 1.25
        assert row["lipschitz"] > row["bound"]
    assert rows[0]["observed"] > rows[1]["observed"] > rows[2]["observed"] > 0


def test_missing_data_is_said_in_one_sentence(tmp_path: Path) -> None:
    done = tightness("--data", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "does not exist" in done.stderr


@needs_data
def test_too_many_samples_are_refused() -> None:
    done = tightness("--model", "mlp2", "--samples", "10001")
    assert done.returncode == 1
    assert "10,000" in done.stderr
