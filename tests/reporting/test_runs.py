from __future__ import annotations

import pytest

from lightning_caq.report import QuantizationReport
from lightning_caq.reporting.files import write_outputs
from lightning_caq.reporting.gallery import Gallery
from lightning_caq.reporting.runs import read_run


@pytest.fixture
def log_dir(tmp_path, plan, names, make_run):
    report, profile = make_run(names)
    write_outputs(tmp_path / "version_0" / "caq", plan, profile, report, Gallery())
    return tmp_path / "version_0"


def test_a_run_is_read_back_from_either_folder(log_dir, make_run, names) -> None:
    for folder in (log_dir, log_dir / "caq"):
        run = read_run(folder)
        assert (run.report, run.profile) == make_run(names)
        assert run.plan is not None
        assert run.problems == {}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("profile.json", None, "is missing"),
        ("profile.json", "{", "is damaged"),
        ("report.json", "[]", "is damaged"),
        ("report.json", '{"layers": []}', "is damaged"),
        ("plan.json", "{}", "cannot be used"),
    ],
)
def test_what_is_missing_or_damaged_is_told_and_the_rest_is_read(log_dir, name, content, problem) -> None:
    path = log_dir / "caq" / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    run = read_run(log_dir)
    part = name.removesuffix(".json")
    assert getattr(run, part) is None
    assert run.problems[name].startswith(problem)
    assert sum(x is not None for x in (run.report, run.profile, run.plan)) == 2


def test_a_folder_without_a_run_names_those_below(log_dir) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run.*It holds runs deeper down: .*version_0\."):
        read_run(log_dir.parent)
    (log_dir / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"holds no run: there is none of report\.json, .* in its folder caq\.$"
    ):
        read_run(log_dir / "empty")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_run(log_dir / "nowhere")


def test_a_report_with_every_study_survives_its_file(make_run) -> None:
    report, _ = make_run(["a", "b"])
    assert report.studies.training
    assert QuantizationReport.from_json(report.to_json()) == report
