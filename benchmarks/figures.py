"""Time and bytes of every figure and of the HTML report, for networks of so many layers.

python benchmarks/figures.py --layers 4 54 300

The runs are made up from plain numbers, with names of the lengths that real networks have.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from made_run import made_run
from stopwatch import machine

from lightning_caq.report import text_table
from lightning_caq.reporting.gallery import ENTRIES, Gallery, draw_gallery
from lightning_caq.reporting.html import picture, write_html


@dataclass(frozen=True)
class Row:
    """What one figure takes.

    Attributes:
        layers: Layers of the network.
        figure: Its tag, or ``"report.html"`` for the whole page.
        draw: Seconds to lay it out.
        png: Seconds to write it as PNG at 150 dots an inch; ``None`` for the page.
        png_bytes: Bytes of that file.
        html: Seconds to write it into the page.
        html_bytes: Bytes that it takes there.
    """

    layers: int
    figure: str
    draw: float
    png: float | None
    png_bytes: int | None
    html: float
    html_bytes: int


def figure_rows(layers: int) -> list[Row]:
    """Every figure of a run over so many layers, one after the other, and the page with all of them."""
    report, profile = made_run([f"layer{i // 20}.{i % 20}.conv" for i in range(layers)])
    rows, gallery = [], Gallery()
    for entry in ENTRIES:
        start = time.perf_counter()
        figure = gallery.figures[entry.tag] = entry.draw(report, profile)
        drawn = time.perf_counter()
        pixels = io.BytesIO()
        figure.savefig(pixels, dpi=150)
        saved = time.perf_counter()
        image = picture(figure, entry.title)
        ended = time.perf_counter()
        sizes = len(pixels.getvalue()), len(image)
        rows.append(Row(layers, entry.tag, drawn - start, saved - drawn, sizes[0], ended - saved, sizes[1]))
    start = time.perf_counter()
    gallery = draw_gallery(report, profile)
    drawn = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = write_html(Path(folder) / "report.html", report, profile, None, gallery)
        ended, size = time.perf_counter(), path.stat().st_size
    return [*rows, Row(layers, "report.html", drawn - start, None, None, ended - drawn, size)]


def table(rows: Sequence[Row]) -> str:
    """The rows as text: seconds and kilobytes."""
    header = ["layers", "figure", "draw s", "png s", "png kB", "html s", "html kB"]
    body = [
        [str(r.layers), r.figure, _text(r.draw, 2), _text(r.png, 2), _kilo(r.png_bytes), _text(r.html, 2),
         _kilo(r.html_bytes)] for r in rows
    ]  # fmt: skip
    return text_table(header, body)


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _kilo(size: int | None) -> str:
    return _text(None if size is None else size / 1000, 0)


def main() -> None:
    """Draw, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 54, 300], help="numbers of layers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    draw_gallery(*made_run(["warm", "up"]))  # imports and fonts
    rows = [row for layers in options.layers for row in figure_rows(layers)]
    if options.json:
        command = shlex.join(["python", *sys.argv])
        print(json.dumps({"command": command, "machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))
        return
    print(machine())
    print(table(rows))
    for layers in options.layers:
        pictures = [row for row in rows if row.layers == layers and row.png is not None]
        print(f"{layers} layers: all figures drawn and written as PNG in {sum(r.draw + r.png for r in pictures):.1f} s")


if __name__ == "__main__":
    main()
