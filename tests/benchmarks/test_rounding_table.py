"""The benchmark of roundings: which images it judges on, and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rounding

    return rounding


def test_images_are_used_or_left_and_each_once(rounding) -> None:
    images = rounding.Images(torch.arange(20.0), torch.arange(20))
    used, left = rounding.split(images, 8, seed=3)
    assert torch.equal(used.y, images.sample(8, 3).y)
    assert sorted([*used.y.tolist(), *left.y.tolist()]) == list(range(20))


def test_table_holds_what_a_reader_needs(rounding) -> None:
    row = rounding.Row(2.5, "long_axis", 1, 90.0, 0.0123, 0.0456, 1.3e-7, 178.8, 0.0001)
    text = rounding.as_text([row], rounding.parser().parse_args([]), "python benchmarks/rounding.py")
    for words in ("long_axis", "90.0", "0.0123", "0.0456", "1.3e-07", "178.8", "0.01%", "recentre", "rounding.py"):
        assert words in text
