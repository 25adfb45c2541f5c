from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from made_run import made_run

from lightning_caq.reporting.figures.bits import bits_heatmap
from lightning_caq.reporting.figures.landscape import loss_landscape
from lightning_caq.reporting.vectors import slim, svg

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@pytest.fixture(scope="module")
def drawings() -> list[tuple[str, str]]:
    """As matplotlib writes them, and as they are kept."""
    report, _ = made_run([f"block.{i}" for i in range(12)])
    figures = [bits_heatmap(report), loss_landscape(report.studies.landscape)]
    return [(matplotlib_svg(figure), svg(figure)) for figure in figures]


def matplotlib_svg(figure) -> str:
    from io import StringIO

    drawn = StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def test_every_path_and_every_glyph_stays_where_it_was(drawings) -> None:
    for before, after in drawings:
        old, new = ElementTree.fromstring(before), ElementTree.fromstring(after)
        for kind in ("path", "image"):
            pairs = list(zip(old.iter(SVG + kind), new.iter(SVG + kind), strict=True))
            assert all(numbers(a.get("d", "")) == pytest.approx(numbers(b.get("d", "")), abs=0.00501) for a, b in pairs)
            assert [a.get("transform") for a, _ in pairs if kind == "path"] == [
                b.get("transform") for _, b in pairs if kind == "path"
            ]
        glyphs = [
            (place(a), (float(b.get("x", 0)), float(b.get("y", 0))))
            for a, b in zip(old.iter(SVG + "use"), new.iter(SVG + "use"), strict=True)
            if "DejaVu" in a.get(LINK)
        ]
        assert len(glyphs) > 100
        assert all(a == pytest.approx(b, abs=0.501) for a, b in glyphs)  # hundredths of the size of the font


def place(use: ElementTree.Element) -> tuple[float, float]:
    found = numbers(use.get("transform", ""))
    return (*found, 0.0, 0.0)[:2] if found else (0.0, 0.0)


def test_every_link_leads_somewhere(drawings) -> None:
    for _, after in drawings:
        root = ElementTree.fromstring(after)
        known = {element.get("id") for element in root.iter()}
        assert {(use.get(LINK) or use.get("href"))[1:] for use in root.iter(SVG + "use")} <= known
        assert set(re.findall(r"url\(#(\w+)\)", after)) <= known


def test_it_is_smaller_and_the_same_every_time(drawings) -> None:
    assert all(len(after) < 0.8 * len(before) for before, after in drawings)
    report, _ = made_run(["a"])
    assert svg(bits_heatmap(report)) == svg(bits_heatmap(report))


def test_small_scales_keep_their_digits() -> None:
    assert slim('<g transform="translate(1.23456 2) scale(0.065 -0.065)"><path d="M 0.0123 1"/></g>') == (
        '<g transform="translate(1.23 2) scale(0.065 -0.065)"><path d="M 0.01 1"/></g>'
    )
