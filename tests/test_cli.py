from __future__ import annotations

import math
import sys
from dataclasses import replace

import nets
import pytest
import torch
from every import every
from made_run import made_run

from lightning_caq import quantize
from lightning_caq.cli import main
from lightning_caq.export.packed import save_quantized
from lightning_caq.reporting.files import write_outputs
from lightning_caq.reporting.gallery import ENTRIES, Gallery


@pytest.fixture
def runs(tmp_path):
    """Two runs of a small network in folders of their own, and a file of the second network."""
    batch = torch.randn(32, 4)
    for name, bits in (("a", 3), ("b", 4)):
        net = nets.mlp()
        evaluate = lambda net: {"acc": float(net(batch).std().detach())}  # noqa: E731
        result = quantize(net, [batch], avg_bits=bits, compare=("uniform",), evaluate=evaluate)
        write_outputs(tmp_path / name / "caq", result.plan, result.profile, result.report, Gallery())
    save_quantized(net, tmp_path / "net.safetensors")
    return tmp_path


def test_report_draws_everything_again(runs, capsys) -> None:
    main(["report", str(runs / "a")])
    told = capsys.readouterr()
    assert "quantized (cet)" in told.out
    assert told.err == ""
    folder = runs / "a" / "caq"
    pictures = {path.stem for path in folder.glob("*.png")}
    assert {"bits", "curvature", "spectrum", "pareto"} <= pictures
    assert f"{len(pictures)} figures and {folder / 'report.html'}" in told.out
    assert (folder / "report.html").read_text(encoding="utf-8").count("<img") == len(pictures)


def test_report_goes_on_without_a_file_and_says_so(runs, capsys) -> None:
    (runs / "a" / "caq" / "report.json").unlink()
    main(["report", str(runs / "a")])
    told = capsys.readouterr()
    assert "report.json is missing." in told.err
    (line,) = (line for line in told.out.splitlines() if line.startswith("not drawn: bits, last_bit, pareto, "))
    assert line.endswith(". There is no report.")
    assert (runs / "a" / "caq" / "spectrum.png").exists()


def test_report_of_files_that_cannot_be_used_writes_nothing(tmp_path, capsys) -> None:
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "plan.json").write_text("no JSON")
    with pytest.raises(SystemExit, match="no file that can be used; nothing was written"):
        main(["report", str(tmp_path)])
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == [str(tmp_path / f"{x}.json") for x in ("report", "profile", "plan")]
    assert all(line.endswith(".") and not line.endswith("..") for line in told)
    assert not (tmp_path / "report.html").exists()


def test_report_of_one_layer_with_a_long_name_and_no_kappa(tmp_path, capsys) -> None:
    report, profile = made_run(["block." * 19 + "linear"])
    (layer,) = profile.layers
    (tmp_path / "report.json").write_text(report.to_json())
    (tmp_path / "profile.json").write_text(replace(profile, layers=(replace(layer, kappa=math.nan),)).to_json())
    main(["report", str(tmp_path)])
    out = capsys.readouterr().out
    assert "not drawn: kappa_vs_bits. No layer has a positive κ and bits" in out
    assert f"{len(ENTRIES) - 1} figures and" in out


def test_compare_lays_runs_side_by_side(runs, capsys) -> None:
    page = runs / "side.html"
    main(["compare", str(runs / "a"), str(runs / "b"), f"--output={page}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == ["a"] * 3 + ["b"] * 3
    assert lines[-1] == str(page)
    assert page.read_text(encoding="utf-8").count("<img") == 1


def test_allocate_again_from_the_profile_alone(runs, capsys) -> None:
    main(["allocate", str(runs / "a"), "--method", "mckp", "--avg_bits", "4"])
    allocation, frontier = capsys.readouterr().out.split("\n\n")
    assert "mckp at 4 bits" in allocation
    points = [line.split() for line in frontier.splitlines() if line.strip()[:1].isdigit()]
    sizes, costs = ([float(point[i]) for point in points] for i in (0, 1))
    assert (sizes[0], sizes[-1]) == (2.0, 8.0)
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)


def test_allocate_says_what_it_needs(runs) -> None:
    with pytest.raises(SystemExit, match="searches"):
        main(["allocate", str(runs / "a"), "--method", "evolution"])
    (runs / "a" / "caq" / "profile.json").unlink()
    with pytest.raises(SystemExit, match=r"profile.json is missing; nothing to allocate by"):
        main(["allocate", str(runs / "a")])


def test_inspect_counts_bits_and_bytes(runs, capsys) -> None:
    main(["inspect", str(runs / "net.safetensors")])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:1].isdigit()}
    for name, shape in (("0.weight", "5x4"), ("2.weight", "3x5")):
        _, bits, numbers, found, size = rows[name]
        channels, inputs = map(int, shape.split("x"))
        assert (found, int(numbers)) == (shape, channels * inputs)
        # Codes, and for each channel a float32 scale and a 16-bit zero point.
        assert int(size) == -(-channels * inputs * int(bits) // 8) + channels * (4 + 2)
    assert f"the file has {(runs / 'net.safetensors').stat().st_size:,}." in out


@every(
    ("args", "message"),
    [
        (["report", "nowhere"], "lightning-caq: nowhere is no folder"),
        (["compare", "nowhere"], "lightning-caq: nowhere is no folder"),
        (["inspect", "nowhere"], "lightning-caq: nowhere cannot be read"),
    ],
)
def test_bad_paths_end_with_a_message(args, message) -> None:
    with pytest.raises(SystemExit, match=message):
        main(args)


def test_compare_needs_reports(runs) -> None:
    (runs / "b" / "caq" / "report.json").write_text("{")
    with pytest.raises(SystemExit, match=r"report\.json is damaged .*; nothing to compare"):
        main(["compare", str(runs / "a"), str(runs / "b")])


def test_without_jsonargparse_it_is_said_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match="pip install 'jsonargparse"):
        main(["report", "x"])
