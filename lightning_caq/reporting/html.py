"""HTML: a run on one self-contained page, which opens in any browser and needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure

from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.gallery import ENTRIES, Gallery
from lightning_caq.reporting.page import page
from lightning_caq.reporting.repeat import repeat
from lightning_caq.reporting.vectors import svg
from lightning_caq.reporting.words import (
    comparison,
    in_words,
    layer_columns,
    reason_in_words,
    reasons_in_words,
)
from lightning_caq.sizes import average_bits

if TYPE_CHECKING:
    from lightning_caq.plan import QuantizationPlan


class Figures(NamedTuple):
    """A cell of figures that is sorted by one number.

    Attributes:
        text: What is shown.
        value: What it is sorted by.
    """

    text: str
    value: float


Cell = str | float | Figures | None
_NUMBER = ' class="number"'


def write_html(
    path: str | Path,
    report: QuantizationReport | None,
    profile: CurvatureProfile | None,
    plan: QuantizationPlan | None,
    gallery: Gallery,
) -> Path:
    """Write what is known of a run as one HTML file: words, tables that can be sorted, figures, and how to repeat it.

    Whatever part of the run is missing is left out, and the page says so.

    Args:
        path: Where to write.
        report: What came of the run.
        profile: What was measured.
        plan: What was done to the network.
        gallery: The figures.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    sections = [
        *_notes(report),
        *_result(report),
        *_layers(report, profile),
        *_figures(gallery),
        *_plan(plan),
        *_repeat(report, profile if path.with_name("profile.json").is_file() else None),
        *_absent(report=report, profile=profile, plan=plan),
    ]
    title = f"Quantized by {report.method} at {report.budget}" if report else "Quantization"
    path.write_text(page(title, "\n".join(sections)), encoding="utf-8")
    return path


def write_comparison(path: str | Path, runs: Mapping[str, QuantizationReport], figure: Figure | None) -> Path:
    """Write several runs side by side as one HTML file.

    Args:
        path: Where to write.
        runs: Name to report.
        figure: All networks against their size, if there is a metric to compare.

    Returns:
        The path.

    Raises:
        OSError: If the file cannot be written.
    """
    header, rows = comparison(runs)
    told = [f"<h3>{escape(name)}</h3><p>{escape(' '.join(in_words(report)))}</p>" for name, report in runs.items()]
    shown = [] if figure is None else [f'<figure><div class="paper">{picture(figure, "All runs")}</div></figure>']
    sections = [section("Networks", table(header, rows)), section("Figure", *shown), section("Runs", *told)]
    path = Path(path)
    path.write_text(page(f"{len(runs)} runs compared", "\n".join(sections)), encoding="utf-8")
    return path


def section(title: str, *content: str) -> str:
    """A section of the page; its content is HTML.

    Example:
        >>> section("Plan", "<p>None.</p>").splitlines()
        ['<section><h2>Plan</h2>', '<p>None.</p></section>']
    """
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(content) + "</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table that can be sorted by any column: numbers by size, all else by letters, what is missing last.

    Example:
        >>> table(["layer", "κ"], [["fc", 0.123456], ["conv", None]]).count("<td")
        4
    """
    rows = list(rows)
    words = [any(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    head = "".join(
        f'<th scope="col"{"" if word else _NUMBER}><button type="button">{escape(cell)}</button></th>'
        for cell, word in zip(header, words, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    whole = f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="sortable">{whole}</table></div>'


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    if isinstance(value, Figures):
        text, value = value
    else:
        text = f"{value:,}" if isinstance(value, int) else f"{value or 0.0:.4g}"
    if value is None or value != value:
        return f"<td{_NUMBER}>–</td>"
    key = repr(value).replace("inf", "Infinity")  # as JavaScript reads it
    return f'<td{_NUMBER} data-value="{key}">{text}</td>'


def picture(figure: Figure, title: str) -> str:
    """A figure as an image in the page, as vectors: they print at any size.

    Args:
        figure: The figure.
        title: What it shows, for those who cannot see it.

    Example:
        >>> picture(Figure(figsize=(2, 1)), "Nothing")[:35]
        '<img src="data:image/svg+xml,<?xml '
    """
    # What a URL or the attribute around it would take for its end; a URL loses its line breaks. Less than base64 takes.
    source = svg(figure).replace("%", "%25").replace("#", "%23").replace("\n", " ").replace("&", "&amp;")
    image = source.replace("'", "%27").replace('"', "'")
    return f'<img src="data:image/svg+xml,{image}" alt="{escape(title)}" width="{96 * figure.get_figwidth():.0f}">'


def _notes(report: QuantizationReport | None) -> list[str]:
    """What the reader should know, ahead of all else."""
    if report is None or not report.notes:
        return []
    marks = {"warning": "<strong>Warning:</strong> ", "information": ""}
    items = "".join(f'<li class="{note.severity}">{marks[note.severity]}{escape(note)}</li>' for note in report.notes)
    return [section("Notes", f"<ul>{items}</ul>")]


def _result(report: QuantizationReport | None) -> list[str]:
    if report is None:
        return []
    header, rows = report.variant_cells()
    told = [f"<p>{escape(text)}</p>" for text in in_words(report)]
    legend = f"<p>{escape(report.legend)}</p>" if report.legend else ""
    return [section("Result", *told, table(header, map(_numbers, rows)), legend)]


def _numbers(cells: Sequence[str]) -> list[Cell]:
    """Cells of a text table: all but the name are numbers."""
    return [cells[0], *(_number(cell) for cell in cells[1:])]


def _number(cell: str) -> Cell:
    """A cell of figures, which is sorted by the first of them."""
    first, _, more = cell.partition(" ")
    try:
        value = float(first.replace(",", "").rstrip("x%"))
    except ValueError:
        return None
    return Figures(cell, value) if more or first.endswith("%") else value


def _layers(report: QuantizationReport | None, profile: CurvatureProfile | None) -> list[str]:
    header, rows = layer_columns(report, profile)
    if not rows:
        return []
    told = "".join(f"<p>{escape(text)}</p>" for text in reasons_in_words(report)) if report else ""
    each = "".join(f"<li>{escape(reason_in_words(reason))}</li>" for reason in report.reasons) if report else ""
    more = f"<details><summary>Why each layer has its bits</summary><ul>{each}</ul></details>" if each else ""
    return [section("Layers", f"{told}<p>Click a heading to sort.</p>", table(header, rows), more)]


def _figures(gallery: Gallery) -> list[str]:
    parts = []
    for entry in ENTRIES:
        if entry.tag in gallery.figures:
            image = picture(gallery.figures[entry.tag], entry.title)
            parts.append(
                f'<figure id="{entry.tag}"><h3>{escape(entry.title)}</h3>\n<div class="paper">{image}</div>\n'
                f"<figcaption>{escape(entry.reading)}</figcaption></figure>"
            )
    missing = [
        f"<li>{escape(entry.title)}: {escape(gallery.missing[entry.tag])}</li>"
        for entry in ENTRIES
        if entry.tag in gallery.missing
    ]
    if missing:
        parts.append(f"<h3>Not drawn</h3><ul>{''.join(missing)}</ul>")
    return [section("Figures", *parts)]


def _plan(plan: QuantizationPlan | None) -> list[str]:
    if plan is None:
        return []
    repairs = f" {len(plan.repairs)} statistics and biases were repaired." if plan.repairs else ""
    text = (
        f"{len(plan.layers)} layers, {plan.avg_bits:.2f} bits a weight on average, {plan.bytes:,} bytes with scales, "
        f"zero points and excluded layers. Weights were rounded by {plan.rounding}.{repairs} Made for the float "
        f"weights with fingerprint {plan.fingerprint}."
    )
    rows: list[list[Cell]] = [
        [
            x.name,
            average_bits(x.grid.width),
            "–" if x.input_grid is None else x.input_grid.bits,
            x.codes.numel(),
            x.scales,
            "×".join(map(str, x.codes.shape)),
        ]
        for x in plan.layers
    ]
    header = ["layer", "bits", "input bits", "weights", "scales", "shape"]
    return [section("Plan", f"<p>{escape(text)}</p>", "<details><summary>Every layer of the plan</summary>",
                    table(header, rows), "</details>")]  # fmt: skip


def _repeat(report: QuantizationReport | None, profile: CurvatureProfile | None) -> list[str]:
    if report is None:
        return []
    texts = repeat(report, profile)
    allocation = f"<p>The bits again, in the folder of this page:</p><pre>{escape(texts.allocation or '')}</pre>"
    versions: list[list[Cell]] = [[name, version] for name, version in report.versions.items()]
    seconds: list[list[Cell]] = [[step, value] for step, value in report.seconds.items()]
    return [
        section(
            "How to repeat it",
            f"<p>Seed {escape(json.dumps(report.options.get('seed')))}. With LightningCLI, as a file for --config:</p>",
            f"<pre>{escape(texts.yaml)}</pre>",
            "<p>In Python, for the callbacks of a Trainer:</p>",
            f"<pre>{escape(texts.callback)}</pre>",
            "<p>On the same float network and calibration batches, without a Trainer:</p>",
            f"<pre>{escape(texts.function)}</pre>",
            allocation if texts.allocation else "",
            table(["package", "version"], versions) if versions else "",
            table(["step", "seconds"], seconds) if seconds else "",
        )
    ]


def _absent(**parts: Any) -> list[str]:
    absent = [name for name, part in parts.items() if part is None]
    return [section("Missing", f"<p>This run has no {' and no '.join(absent)}.</p>")] if absent else []
