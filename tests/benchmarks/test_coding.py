"""The benchmark of entropy coding: its table and its numbers."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def coding(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import coding

    return coding


def test_one_row_a_scale(coding, capsys):
    arguments = ["--rows", "32", "--matrices", "2", "--rounds", "1", "--scale", "0.5", "300"]
    coding.main([*arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["scale"] for row in rows] == [0.5, 300]
    assert all(row["entropy"] * 0.99 < row["bits"] < 1.03 * row["entropy"] for row in rows)
    assert rows[0]["lzma"] > rows[0]["bits"]
    assert rows[1]["lzma"] is None
    coding.main(arguments)
    assert "Command: python benchmarks/coding.py --rows 32" in capsys.readouterr().out


def test_bad_arguments(coding):
    with pytest.raises(SystemExit, match="must be positive"):
        coding.main(["--scale", "0"])
