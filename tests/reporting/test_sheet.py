from __future__ import annotations

from itertools import pairwise

import pytest
from every import every

from lightning_caq.reporting.sheet import inches, sheet, short_names, shorten


@every("length", [1, 19, 20, 21, 120])
def test_shorten_keeps_both_ends_and_the_limit(length: int) -> None:
    name = "".join(chr(ord("a") + i % 26) for i in range(length))
    short = shorten(name, 20)
    assert len(short) == min(length, 20)
    assert (short[0], short[-1]) == (name[0], name[-1])
    assert ("…" in short) == (length > 20)


def test_short_names_grow_until_they_differ() -> None:
    names = [f"encoder.layers.{i}.self_attention.output_projection" for i in range(12)]
    assert len({shorten(n, 30) for n in names}) == 1
    assert len(set(short_names(names, 30))) == 12


def test_short_names_are_numbered_where_length_does_not_help() -> None:
    names = ["a" * 60 + middle + "b" * 60 for middle in "xyz"]
    short = short_names(names, 30)
    assert [s.split(":")[0] for s in short] == ["0", "1", "2"]


@every("layers", [1, 4, 36, 37, 60, 181, 300])
def test_panels_hold_every_layer_once_in_rows_of_one_height(layers: int) -> None:
    figure, panels = sheet([f"l{i}" for i in range(layers)], title="T", subtitle="t", width=2, right=1, header=0.3)
    shown = [label.get_text() for axes, _ in panels for label in axes.get_yticklabels()]
    assert shown == [f"l{i}" for i in range(layers)]
    heights = [axes.get_position().height / (rows.stop - rows.start) for axes, rows in panels]
    assert heights == pytest.approx([heights[0]] * len(panels))
    assert heights[0] * figure.get_figheight() * 72 > 12  # points: more than a line of text of 8 points takes
    tops = {round(axes.get_position().y1, 6) for axes, _ in panels}
    assert len(tops) == 1
    boxes = [axes.get_position() for axes, _ in panels]
    assert all(0 < box.x0 < box.x1 <= 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_inches_is_the_width_of_the_longest_line() -> None:
    assert inches("ab\nabcdef\n") == pytest.approx(inches("abcdef"))
    assert inches("abc", 16) == pytest.approx(2 * inches("abc", 8), rel=0.05)
    assert inches("") == 0
