from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch

from lightning_caq.plan import LayerPlan, QuantizationPlan
from lightning_caq.quantizers.grids.affine import Grid
from lightning_caq.reporting.gallery import ENTRIES, Gallery, draw_gallery
from lightning_caq.reporting.html import table, write_comparison, write_html
from lightning_caq.reporting.words import in_words
from lightning_caq.sizes import LayerSizes

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects the cells of every table, the pictures and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        found = dict(attrs)
        self.addresses += [found[key] for key in ("src", "href") if found.get(key)]
        if tag == "img":
            self.images.append(found)
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", found.get("data-value")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if {"td", "th"} & set(self.open):
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, value)


@pytest.fixture
def page(tmp_path, plan, names, make_run) -> str:
    report, profile = make_run(names)
    path = write_html(tmp_path / "report.html", report, profile, plan, draw_gallery(report, profile))
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_asks_for_nothing_from_outside(page) -> None:
    reader = Reader(page)
    assert page.startswith("<!doctype html>")
    assert all(address.startswith("data:image/svg+xml,") for address in reader.addresses)
    assert "http" not in re.sub(r'"data:image[^"]*"', "", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_every_figure_is_a_picture_that_can_be_parsed(page) -> None:
    images = Reader(page).images
    assert [image["alt"] for image in images] == [entry.title for entry in ENTRIES]
    for image in images:
        root = ElementTree.fromstring(unquote(image["src"].split(",", 1)[1]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_table_of_layers_carries_numbers_to_sort_by(page, names) -> None:
    table = next(t for t in Reader(page).tables if t[0][0][0] == "layer" and len(t[0]) > 6)
    header = [text for text, _ in table[0]]
    assert [row[0][0] for row in table[1:]] == names
    for column, values in (("weights", [100, 200, 300, 400]), ("bits", [2, 3, 4, 5]), ("κ (out²/in²)", [1, 2, 4, 8])):
        assert [float(row[header.index(column)][1]) for row in table[1:]] == values
    assert [float(row[header.index("A (gain to the output)")][1]) for row in table[1:]] == [1, 2, 3, 4]


def test_words_are_escaped_and_notes_are_there(page) -> None:
    assert "A note &lt;of&gt; the run." in page
    assert "val_acc is 0.9, against 0.915 of the float network" in page


def test_a_run_of_which_little_is_left_says_so(tmp_path, make_run, names) -> None:
    report, profile = make_run(names)
    for parts in ((None, profile, None), (report, None, None), (None, None, None)):
        gallery = draw_gallery(parts[0], parts[1])
        text = write_html(tmp_path / "r.html", *parts, gallery).read_text(encoding="utf-8")
        assert len(Reader(text).images) == len(gallery.figures)
        for part, name in zip(parts, ("report", "profile", "plan"), strict=True):
            assert (f"no {name}" in text.partition("<h2>Missing</h2>")[2]) == (part is None)
        assert all(reason.replace("'", "&#x27;") in text for reason in gallery.missing.values())


def test_the_page_of_54_layers_is_small(tmp_path, plan, make_run) -> None:
    report, profile = make_run([f"stage{1 + i // 20}.{i}.conv" for i in range(54)])
    path = write_html(tmp_path / "report.html", report, profile, plan, draw_gallery(report, profile))
    assert path.stat().st_size < 5e6


def test_the_same_run_gives_the_same_bytes(tmp_path, plan, make_run, names) -> None:
    run = make_run(names)
    pages = [write_html(tmp_path / f"{i}.html", *run, plan, draw_gallery(*run)).read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


def test_words_compare_with_the_best_of_the_others(make_report) -> None:
    metrics = {"float/val_loss": 0.3, "quantized/val_loss": 0.35, "uniform/val_loss": 0.4}
    told = " ".join(in_words(make_report(["fc"], metrics)))
    assert "val_loss is 0.35, against 0.3 of the float network (a change of +0.05)." in told
    assert "The best of the networks it was compared with, uniform, has 0.4." in told


def test_runs_side_by_side(tmp_path, make_report) -> None:
    runs = {"a": make_report(["fc"], {"quantized/acc": 0.9}), "b<": make_report(["fc"], {"quantized/loss": 0.1})}
    text = write_comparison(tmp_path / "compare.html", runs, None).read_text(encoding="utf-8")
    (table,) = Reader(text).tables
    assert [cell[0] for cell in table[0]] == ["run", "network", "budget", "avg bits", "ratio", "kB", "acc", "loss"]
    assert [row[0][0] for row in table[1:]] == ["a"] * 3 + ["b<"] * 3
    assert [cell[0] for cell in table[2]][6:] == ["0.9", "–"]


def test_a_gallery_without_figures_makes_a_page(tmp_path, plan, make_report) -> None:
    Reader(write_html(tmp_path / "r.html", make_report(["fc"]), None, plan, Gallery()).read_text(encoding="utf-8"))


def test_cells_without_a_number_and_infinite_ones_can_be_sorted() -> None:
    text = table(["x"], [[None], [float("nan")], [float("inf")], [-float("inf")], [2.5]])
    (cells,) = Reader(text).tables
    numbers = [("inf", "Infinity"), ("-inf", "-Infinity"), ("2.5", "2.5")]
    assert [row[0] for row in cells[1:]] == [("–", None), ("–", None), *numbers]


def test_300_layers_with_long_names_and_their_plan_stay_below_5_megabytes(tmp_path, make_run) -> None:
    names = [f"model.backbone.encoder.stages.{i // 20}.layers.{i % 20}.attention.projection" for i in range(300)]
    run = make_run(names)
    layers = tuple(
        LayerPlan(n, (n,), Grid(3, torch.ones(2, 1), torch.zeros(2, 1)), torch.ones(2, 3, dtype=torch.uint8))
        for n in names
    )
    plan = QuantizationPlan("cet", "", "nearest", layers, LayerSizes((6,) * 300, (2,) * 300), "abc")
    assert write_html(tmp_path / "r.html", *run, plan, draw_gallery(*run)).stat().st_size < 5e6
