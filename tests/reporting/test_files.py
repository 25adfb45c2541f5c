from __future__ import annotations

import csv
import errno
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lightning_caq.plan import QuantizationPlan
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.files import scalars, write_outputs

DATA = ["layers.csv", "plan.json", "plan.safetensors", "profile.json", "report.html", "report.json"]
FILES = sorted([*DATA, "bits.png", "curvature.png", "kappa_vs_bits.png", "spectrum.png"])
WITH_METRIC = sorted([*FILES, "pareto.png"])


def test_every_file_is_written_and_reads_back(tmp_path, plan, names, make_report, make_profile) -> None:
    report, profile = make_report(names, {"quantized/val_acc": 0.9}), make_profile(names)
    paths = write_outputs(tmp_path / "logs" / "caq", plan, profile, report)
    assert [p.name for p in paths] == WITH_METRIC
    assert sorted(p.name for p in (tmp_path / "logs" / "caq").iterdir()) == WITH_METRIC
    by_name = {p.name: p for p in paths}
    assert QuantizationReport.from_json(by_name["report.json"].read_text(encoding="utf-8")) == report
    assert CurvatureProfile.from_json(by_name["profile.json"].read_text(encoding="utf-8")) == profile
    loaded = QuantizationPlan.load(by_name["plan.json"])
    assert loaded.bits == plan.bits
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(loaded.layers, plan.layers, strict=True))
    for name in ("bits.png", "curvature.png"):
        with Image.open(by_name[name]) as image:
            assert min(image.size) > 300


def test_layers_table_holds_everything_that_was_measured(tmp_path, plan, names, make_report, make_profile) -> None:
    write_outputs(tmp_path, plan, make_profile(names), make_report(names))
    with (tmp_path / "layers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == names
    second = rows[1]
    assert {k: second[k] for k in ("kind", "weights", "macs", "channels", "bits_quantized", "bits_uniform")} == {
        "kind": "conv2d",
        "weights": "200",
        "macs": "6400",
        "channels": "10",
        "bits_quantized": "3",
        "bits_uniform": "3",
    }
    assert float(second["kappa"]) == 2.0
    assert float(second["lipschitz"]) == 1.5
    assert (float(second["rounding_error_2bit"]), float(second["rounding_error_3bit"])) == (0.5, 0.25)
    assert second["outside"] == "2 3"
    assert second["trace"] == ""


def test_layers_that_were_measured_differently_share_one_header(tmp_path, plan, make_report) -> None:
    rows = (LayerCurvature("a", 1, 1, 1, loss_change={2: 0.1}), LayerCurvature("b", 1, 1, 1, loss_change={4: 0.2}))
    write_outputs(tmp_path, plan, CurvatureProfile(rows), make_report(["a", "b", "c"]))
    with (tmp_path / "layers.csv").open(newline="", encoding="utf-8") as file:
        table = {row["layer"]: (row["loss_change_2bit"], row["loss_change_4bit"]) for row in csv.DictReader(file)}
    assert table == {"a": ("0.1", ""), "b": ("", "0.2"), "c": ("", "")}


def test_a_full_disk_leaves_the_earlier_files_whole(
    tmp_path, plan, names, make_report, make_profile, monkeypatch
) -> None:
    write_outputs(tmp_path, plan, make_profile(names), make_report(names))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self: Figure, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        write_outputs(tmp_path, plan, make_profile(names), make_report(["x", "y"]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_writing_again_replaces_the_files(tmp_path, plan, names, make_report, make_profile) -> None:
    write_outputs(tmp_path, plan, make_profile(names), make_report(names, {"quantized/val_acc": 0.5}))
    assert (tmp_path / "pareto.png").exists()
    write_outputs(tmp_path, plan, make_profile(names), make_report(names, {"float/val_acc": 0.5}))
    assert QuantizationReport.from_json((tmp_path / "report.json").read_text()).metrics == {"float/val_acc": 0.5}
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


def test_scalars_have_one_key_a_number(make_report) -> None:
    profile = CurvatureProfile((LayerCurvature("fc", 1, 1, 1, kappa=3.0), LayerCurvature("head", 1, 1, 1, lipschitz=2)))
    values = scalars(make_report(["fc", "head"], {"float/val_acc": 0.9, "uniform/val/loss": 0.2}), profile)
    assert values == {
        "caq/avg_bits": 2.96,
        "caq/ratio": 10.26,
        "caq/float/val_acc": 0.9,
        "caq/uniform/val/loss": 0.2,
        "caq/bits/fc": 2.0,
        "caq/bits/head": 3.0,
        "caq/kappa/fc": 3.0,
        "caq/lipschitz/head": 2.0,
    }
    assert all(type(value) is float for value in values.values())
