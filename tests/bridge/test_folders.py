from __future__ import annotations

from types import SimpleNamespace

from lightning_caq.bridge.folders import earlier_profile, output_directory
from lightning_caq.profile import CurvatureProfile, LayerCurvature


def test_a_run_takes_a_folder_that_no_other_has(tmp_path):
    trainer = SimpleNamespace(log_dir=None, default_root_dir=str(tmp_path))
    for name in ("caq", "caq-v1", "caq-v2"):
        assert output_directory(trainer) == tmp_path / name
        (tmp_path / name).mkdir()
    (tmp_path / "logs").mkdir()
    assert output_directory(SimpleNamespace(log_dir=str(tmp_path / "logs"))) == tmp_path / "logs" / "caq"


def test_what_is_measured_already_is_that_of_the_latest_run(tmp_path):
    assert earlier_profile(tmp_path / "caq") is None
    for version, name in enumerate(["caq", *(f"caq-v{i}" for i in range(1, 12))]):  # 11 follows 2
        (tmp_path / name).mkdir()
        profile = CurvatureProfile((LayerCurvature("fc", 1, 1, 1, kappa=float(version)),))
        (tmp_path / name / "profile.json").write_text(profile.to_json())
    assert earlier_profile(tmp_path / "caq-v12")["fc"].kappa == 11
