"""report.html as a colleague sees it: sorted by a click, light and dark, on paper and on a telephone."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import CYCLE, made_run, resnet50_names
from PIL import Image

from lightning_caq.plan import LayerPlan, QuantizationPlan
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.reporting.gallery import ENTRIES, draw_gallery
from lightning_caq.reporting.html import write_html
from lightning_caq.reporting.vectors import svg
from lightning_caq.sizes import LayerSizes

LONG = [f"{'module.' * 14}{i}.{'x' * 20}" for i in range(5)]
NAMES = {"4": ["conv1", "layer1.0.conv1", "layer1.0.conv2", "fc"], "54": resnet50_names(), "long": LONG}


def written(path: Path, names: list[str]) -> Path:
    """The page of a made-up run over layers of these names."""
    grids = [Grid(CYCLE[i % 6], torch.ones(2, 1), torch.zeros(2, 1)) for i in range(len(names))]
    layers = tuple(
        LayerPlan(name, (name,), grid, torch.ones(2, 3, dtype=torch.uint8))
        for name, grid in zip(names, grids, strict=True)
    )
    sizes = LayerSizes((6,) * len(names), (2,) * len(names))
    report, profile = made_run(names)
    plan = QuantizationPlan("cet", "avg_bits=3", "error_feedback", layers, sizes, "abc")
    return write_html(path, report, profile, plan, draw_gallery(report, profile))


@pytest.fixture(scope="module", params=NAMES)
def report(request, tmp_path_factory) -> tuple[str, Path]:
    """How many layers, and the page."""
    return request.param, written(tmp_path_factory.mktemp("page") / "report.html", NAMES[request.param])


def shown(page, report, **media) -> None:
    page.emulate_media(**media)
    page.goto(report[1].as_uri())


def test_a_click_sorts_by_any_column_and_a_second_one_backwards(page, report) -> None:
    shown(page, report)
    tables = page.locator("table.sortable")
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    for table in tables.all():
        before = sorted(map(tuple, cells(table)))
        for column, head in enumerate(table.locator("thead button").all()):
            for order, state in ((1, "ascending"), (-1, "descending")):
                head.click()
                assert table.locator("th").nth(column).get_attribute("aria-sort") == state
                found = cells(table)
                assert sorted(map(tuple, found)) == before  # rows stay whole
                assert_sorted([row[column] for row in found], order)
    assert tables.count() >= 4


def cells(table) -> list[list[str]]:
    return table.evaluate("(x) => [...x.tBodies[0].rows].map((r) => [...r.cells].map((c) => c.textContent))")


def assert_sorted(column: list[str], order: int) -> None:
    """Numbers by size, words by letters with the numbers in them by size, dashes last."""
    known = [cell for cell in column if cell != "–"]
    assert column == known + ["–"] * (len(column) - len(known))
    try:
        keys = [float(cell.replace(",", "")) for cell in known]
    except ValueError:
        keys = [[int(p) if p.isdigit() else p for p in re.split(r"(\d+)", cell.lower())] for cell in known]
    assert keys == sorted(keys, reverse=order < 0)


def test_figures_load_and_nothing_is_fetched(page, report) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    shown(page, report)
    page.wait_for_load_state("load")
    widths = page.locator("figure img").evaluate_all("(all) => all.map((x) => x.complete ? x.naturalWidth : 0)")
    assert len(widths) == len(ENTRIES)
    assert min(widths) > 300
    assert all(url.startswith(("file:", "data:")) for url in asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page, report, screenshots, scheme) -> None:
    shown(page, report, color_scheme=scheme)
    back, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (luminance(back) < 0.1) == (scheme == "dark")
    assert contrast(back, ink) > 7
    for selector in ("figcaption", "th", "td", "pre", "summary"):
        style = f"[...document.querySelectorAll('{selector}')].map((x) => getComputedStyle(x).color)"
        assert all(contrast(back, ink) > 4.5 for ink in page.evaluate(style)), selector
    page.screenshot(path=screenshots / f"report-{report[0]}-{scheme}.png", full_page=True)


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour (WCAG 2.1)."""
    parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(page, report, screenshots, width) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    shown(page, report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=screenshots / f"report-{report[0]}-{width}.png")


def test_it_prints_on_white_with_nothing_cut_off(page, report, screenshots) -> None:
    shown(page, report, media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 less margins of a centimetre
    wide = "[...document.querySelectorAll('table, img, pre')].map((x) => x.getBoundingClientRect().right)"
    assert max(page.evaluate(wide)) <= 718
    page.pdf(path=screenshots / f"report-{report[0]}.pdf", format="A4", margin=dict.fromkeys(("left", "right"), "1cm"))


def test_figures_look_as_matplotlib_draws_them(page, tmp_path) -> None:
    figures = draw_gallery(*made_run(NAMES["54"])).figures
    for tag in ("bits", "tightness", "landscape", "subspace"):
        drawn = []
        figures[tag].savefig(tmp_path / "plain.svg")
        (tmp_path / "slim.svg").write_text(svg(figures[tag]), encoding="utf-8")
        for name in ("plain", "slim"):
            page.goto((tmp_path / f"{name}.svg").as_uri())
            drawn.append(np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"), dtype=float))
        assert np.ptp(drawn[0]) > 200
        assert np.abs(drawn[0] - drawn[1]).mean() < 0.2  # of 255; places differ by a hundredth of a point


def test_the_page_of_a_real_run(page, log_dir, screenshots) -> None:
    shown(page, ("run", log_dir / "caq/report.html"))
    assert "layers were quantized by" in page.locator("section").first.inner_text()
    assert page.locator("figure img").count() >= 10
    page.screenshot(path=screenshots / "report-run.png", full_page=True)
