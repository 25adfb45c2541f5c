from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest

from lightning_caq.notes import Note
from lightning_caq.report import (
    Certainty,
    LayerRow,
    OutputError,
    QuantizationReport,
    Size,
    markdown_table,
    text_table,
)
from lightning_caq.scores import LogRatio
from lightning_caq.studies import LayerReason


@pytest.fixture
def report() -> QuantizationReport:
    rows = (
        LayerRow("conv1", "conv2d", 432, 442368, 12.345678, 1.5, {"quantized": 8, "uniform": 3}),
        LayerRow("linear", "linear", 12345, 12345, None, None, {"quantized": 2, "uniform": 3}),
    )
    sizes = {"float": Size(32.0, 1.0, 51108), "quantized": Size(2.2, 13.5, 3800), "uniform": Size(3.0, 10.0, 5100)}
    metrics = {"float/val_acc": 0.915, "float/val_loss": 0.3, "quantized/val_acc": 0.9, "uniform/val_acc": 0.795}
    return QuantizationReport(
        "cet",
        "avg_bits=3",
        rows,
        sizes,
        metrics,
        predicted_loss={"quantized": 0.01},
        options={"seed": 0, "bits": [2, 3, 8]},
        versions={"python": "3.11"},
        seconds={"measure": 1.5},
        notes=("A note.",),
    )


def test_report_survives_json(report) -> None:
    assert QuantizationReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["layers"][1]["kappa"] is None


def test_notes_are_strings_with_a_severity_warnings_first(report) -> None:
    noted = replace(report, notes=("A note.", Note("Look here.", "warning")))
    for again in (
        noted,
        QuantizationReport.from_json(noted.to_json()),
        copy.deepcopy(noted),
        pickle.loads(pickle.dumps(noted)),
    ):
        assert [(note, note.severity) for note in again.notes] == [
            ("Look here.", "warning"),
            ("A note.", "information"),
        ]
        assert " ".join(again.notes) == "Look here. A note."
    assert noted.table().startswith("Warning: Look here.\nNote: A note.\n\n")


def test_notes_of_earlier_versions_are_read(report) -> None:
    data = json.loads(report.to_json()) | {"notes": ["An old note."]}
    assert QuantizationReport.from_json(json.dumps(data)).notes == ("An old note.",)


def test_the_ratio_to_memory_has_a_column_where_it_differs(report) -> None:
    half = replace(report, sizes={name: replace(x, memory_ratio=x.ratio / 2) for name, x in report.sizes.items()})
    assert "ratio to memory" not in report.table()
    header, rows = half.variant_cells()
    assert [row[header.index("ratio to memory")] for row in rows] == ["0.50x", "6.75x", "5.00x"]


def test_variants_and_metric_names_keep_their_order(report) -> None:
    assert report.variants == ("float", "quantized", "uniform")
    assert report.metric_names == ("val_acc", "val_loss")
    assert replace(report, metrics={"float/val/acc": 1.0}).metric_names == ("val/acc",)


def test_table_shows_layers_and_networks(report) -> None:
    notes, layers, networks = report.table().split("\n\n")
    assert notes == "Note: A note."
    assert layers.splitlines() == [
        "layer   kind    weights  share  bits  bits uniform     κ    L",
        "------  ------  -------  -----  ----  ------------  ----  ---",
        "conv1   conv2d      432    3 %     8             3  12.3  1.5",
        "linear  linear   12,345   97 %     2             3     –    –",
    ]
    assert networks.splitlines() == [
        "network          avg bits   ratio    kB  val_acc  val_loss",
        "---------------  --------  ------  ----  -------  --------",
        "float               32.00   1.00x  51.1    0.915       0.3",
        "quantized (cet)      2.20  13.50x   3.8      0.9         –",
        "uniform              3.00  10.00x   5.1    0.795         –",
    ]


def test_layers_called_by_numbers_are_still_names() -> None:
    assert text_table(["layer", "bits"], [["0", "8"], ["10", "2"]]).splitlines()[2:] == ["0         8", "10        2"]


def test_figures_that_are_not_numbers_stay_in_their_column() -> None:
    table = text_table(["network", "loss"], [["float", "0.25"], ["a", "nan"], ["b", "-1"]])
    assert [line[-4:] for line in table.splitlines()[2:]] == ["0.25", " nan", "  -1"]


def test_markdown_escapes_what_would_end_a_cell() -> None:
    assert markdown_table(["layer", "bits"], [["a|b", "8"]]).splitlines()[2] == r"| a\|b | 8 |"


def test_the_table_says_how_sure_its_figures_are(report) -> None:
    certain = {
        "float/val_acc": Certainty(400, 0.0139, {"quantized": 0.012}),
        "quantized/val_acc": Certainty(400, 0.015, {"float": 0.012, "uniform": 0.014}),
        "uniform/val_acc": Certainty(400, 0.02, {"float": 0.013}),
    }
    errors = {"quantized": OutputError(0.043), "uniform": OutputError(0.05, LogRatio(0.15, 0.03, 64))}
    sure = replace(report, certainty=certain, output_errors=errors)
    assert QuantizationReport.from_json(sure.to_json()) == sure
    header, rows = sure.variant_cells()
    assert [row[header.index("val_acc")] for row in rows] == [
        "0.915 ± 0.014", "0.9 (−0.015 ± 0.012) ≈", "0.795 (−0.12 ± 0.013)",
    ]  # fmt: skip
    assert [row[header.index("output error")] for row in rows] == ["–", "4.3%", "5.0% (1.16x ± 0.03)"]
    assert "val_acc on 400 samples" in sure.legend
    assert sure.legend in sure.table()
    assert not report.legend


def test_the_table_of_layers_says_what_bits_were_chosen_by(report) -> None:
    why = (
        LayerReason("conv1", "cet", "nat", 8, 6, None, 0.25, 1.0, None, 432, "measured"),
        LayerReason("linear", "cet", "nat", 2, None, 3, 0.5, None, 0.125, 12345, "modelled"),
    )
    reasoned = replace(report, reasons=why)
    assert QuantizationReport.from_json(reasoned.to_json()) == reasoned
    header, rows = reasoned.layer_cells()
    assert header[-6:] == ["damage (nat)", "a width less", "a width more", "bought/kB", "κ", "L"]
    assert [row[-6:-2] for row in rows] == [["0.25*", "1", "–", "6.9"], ["0.5", "–", "0.12", "–"]]  # 0.75 nat, 108 B
