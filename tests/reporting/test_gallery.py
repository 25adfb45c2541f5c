from __future__ import annotations

import io
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from readable import assert_readable

from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.gallery import ENTRIES, draw_gallery
from lightning_caq.studies import Studies

TAGS = [
    "bits",
    "last_bit",
    "pareto",
    "rate_distortion",
    "curvature",
    "kappa_vs_bits",
    "error_waterfall",
    "tightness",
    "loss_gap",
    "spectrum",
    "subspace",
    "landscape",
    "eigenpairs",
    "training",
]
MANY = [f"stage{1 + i // 20}.{i}.conv" for i in range(54)]
LONG = [f"{'module.' * 14}{i}.{'x' * 20}" for i in range(5)]


@pytest.mark.parametrize("names", [["fc"], MANY[:4], MANY, LONG], ids=["1", "4", "54", "long names"])
def test_every_figure_of_a_whole_run_is_drawn_and_can_be_read(names, make_run) -> None:
    gallery = draw_gallery(*make_run(names))
    assert list(gallery.figures) == TAGS
    assert gallery.missing == {}
    for figure in gallery.figures.values():
        assert_readable(figure)


def test_a_network_of_300_layers_stays_on_pages_of_a_bearable_size(make_run) -> None:
    gallery = draw_gallery(*make_run([f"stage{i // 20}.{i}.conv" for i in range(300)]))
    sizes = {tag: figure.get_size_inches() for tag, figure in gallery.figures.items()}
    assert all(max(size) < 32 for size in sizes.values()), sizes
    for tag in ("kappa_vs_bits", "error_waterfall", "loss_gap", "spectrum"):
        assert max(sizes[tag]) < 11
        assert_readable(gallery.figures[tag])


def test_what_is_not_there_is_not_drawn_and_is_told() -> None:
    gallery = draw_gallery(None, None)
    assert gallery.figures == {}
    assert set(gallery.missing) == set(TAGS)
    assert gallery.missing["curvature"] == "There is no report and no profile."
    assert gallery.missing["spectrum"] == "There is no profile."


def test_a_report_alone_gives_the_figures_that_need_no_profile(make_run) -> None:
    report, _ = make_run(MANY[:4])
    gallery = draw_gallery(report, None)
    shown = ["bits", "last_bit", "pareto", "rate_distortion", "tightness", "landscape", "eigenpairs", "training"]
    assert list(gallery.figures) == shown
    bare = draw_gallery(replace(report, studies=Studies(), metrics={}, rate_limit=None, reasons=()), None)
    assert list(bare.figures) == ["bits"]
    assert bare.missing["landscape"] == "The loss was not computed on a plane; study=True does that."
    assert bare.missing["eigenpairs"] == "No other numbers of eigenpairs were tried; study=True does that."


def test_numbers_that_are_none_nan_or_infinite_never_break_a_figure(make_run) -> None:
    report, profile = make_run(MANY[:5])
    broken = [
        replace(row, kappa=value, amplification=value, subspace_curvature=value, loss_change={2: value or 0.0})
        for row, value in zip(profile.layers, (math.nan, math.inf, None, 0.0, 1.0), strict=True)
    ]
    metrics = {**report.metrics, "uniform/val_acc": math.nan}
    gallery = draw_gallery(
        replace(report, metrics=metrics), replace(profile, layers=tuple(broken), eigenvalues=(2.0, math.nan, -1.0))
    )
    assert gallery.missing == {}
    for figure in gallery.figures.values():
        assert_readable(figure)


def test_one_method_alone_is_drawn(make_run) -> None:
    report, profile = make_run(MANY[:4])
    layers = tuple(replace(row, bits={"quantized": row.bits["quantized"]}) for row in report.layers)
    sizes = {v: size for v, size in report.sizes.items() if v != "uniform"}
    metrics = {"quantized/val_acc": 0.9}
    alone = replace(report, layers=layers, sizes=sizes, metrics=metrics, studies=replace(report.studies, points=()))
    gallery = draw_gallery(alone, profile)
    assert gallery.missing == {}
    (column,) = {axes.images[0].get_array().shape[1] for axes in gallery.figures["bits"].axes if axes.images}
    assert column == 1
    for figure in gallery.figures.values():
        assert_readable(figure)


def test_nothing_measured_leaves_the_bits() -> None:
    rows = tuple(LayerCurvature(name, 8, 2, 8) for name in ("a", "b"))
    gallery = draw_gallery(QuantizationReport("cet", "", (), {}, {}), CurvatureProfile(rows))
    assert "spectrum" in gallery.missing
    assert "loss_gap" in gallery.missing
    assert "coding='entropy'" in gallery.missing["rate_distortion"]


def test_figures_leave_pyplot_and_settings_alone(make_run) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30}):
        figures = draw_gallery(*make_run(MANY[:4])).figures
        assert mpl.rcParams["font.size"] == 30
    assert plt.get_fignums() == []
    assert all(axes.get_facecolor() == (1, 1, 1, 1) for figure in figures.values() for axes in figure.axes[:1])


def test_each_entry_tells_in_three_sentences_how_it_is_read() -> None:
    assert [entry.tag for entry in ENTRIES] == TAGS
    for entry in ENTRIES:
        sentences = [part for part in entry.reading.replace("float32, and", "").split(". ") if part]
        assert 3 <= len(sentences) <= 4, entry.tag
        assert entry.reading.endswith(".")
        assert "  " not in entry.reading


def test_figures_share_no_state(make_run) -> None:
    def pixels(figure: Figure) -> np.ndarray:
        figure.canvas.draw()
        return np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]

    run = make_run(MANY[:4])
    first, second = draw_gallery(*run).figures, draw_gallery(*run).figures
    assert all((pixels(first[tag]) == pixels(second[tag])).all() for tag in ("bits", "spectrum", "landscape"))


def test_the_page_of_the_docs_says_what_the_figures_say() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "gallery.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        assert f"## {entry.title} (`{entry.tag}`)" in text
        assert entry.reading in text, f"{entry.tag}: run make figures"
        for run in ("demo", "resnet20") if entry.tag != "rate_distortion" else ():  # these have fixed widths
            assert f"(images/gallery/{run}/{entry.tag}.png)" in text
            assert (docs / f"images/gallery/{run}/{entry.tag}.png").is_file()


def test_54_layers_are_drawn_in_seconds(make_run) -> None:
    run, start = make_run(MANY), time.process_time()  # of this process: other work on the machine does not count
    for figure in draw_gallery(*run).figures.values():
        figure.savefig(io.BytesIO())
    assert time.process_time() - start < 10
