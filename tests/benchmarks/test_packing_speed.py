"""The benchmark of packing: its table and its numbers."""

import json
from pathlib import Path

import pytest
from every import every


@pytest.fixture
def packing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import packing

    return packing


def test_one_row_a_width(packing, capsys):
    packing.main(["--codes", "4096", "--rounds", "3", "--bits", "2", "5", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["bits"] for row in rows] == [2, 5]
    assert all(row[key] > 0 for row in rows for key in ("pack", "unpack", "copy", "pack_ratio", "unpack_ratio"))
    packing.main(["--codes", "4096", "--rounds", "3", "--bits", "2"])
    text = capsys.readouterr().out
    assert "4,096 codes" in text
    assert "Command: python benchmarks/packing.py --codes 4096 --rounds 3 --bits 2" in text


def test_many_codes_are_not_handled_one_by_one(packing):
    # A loop over weights in Python makes some ten million bytes a second; torch's operations, hundreds.
    assert packing.measure(2**20, 3, rounds=5).unpack > 0.05


@every("argument", [["--bits", "9"], ["--codes", "0"]])
def test_bad_arguments(packing, argument):
    with pytest.raises(SystemExit, match="must be positive"):
        packing.main(argument)
