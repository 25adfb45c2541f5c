from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every import every

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data"
KEYS = ["model", "method", "rounding", "asked_bits", "avg_bits", "ratio"]
KEYS += ["accuracy", "float_accuracy", "seconds", "steps", "peak_mb", "seed", "gpu_mb"]

needs_data = pytest.mark.skipif(
    not (DATA / "resnet20_cifar10.th").is_file(), reason=f"the benchmark's data is not in {DATA}"
)


def ptq(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks/ptq.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@needs_data
def test_json_has_exactly_the_agreed_keys_and_a_working_network() -> None:
    done = ptq("--avg-bits", "4", "--method", "uniform", "--rounding", "nearest", "--samples", "64", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert list(row) == KEYS
    assert (row["model"], row["method"], row["rounding"], row["seed"]) == ("resnet20", "uniform", "nearest", 0)
    assert row["float_accuracy"] == pytest.approx(91.5, abs=0.05)  # what this network is known for
    assert row["accuracy"] > 85
    assert row["avg_bits"] == row["asked_bits"] == 4
    # 268,336 weights at 4 bits, and 698 channels with 48 bits each for scale and zero point.
    assert row["ratio"] == pytest.approx(32 * 268_336 / (4 * 268_336 + 48 * 698))
    assert row["seconds"] > 0
    assert row["peak_mb"] > 100
    assert "resnet20" in done.stderr


def test_missing_data_is_said_in_one_sentence(tmp_path: Path) -> None:
    done = ptq("--data", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "does not exist" in done.stderr
    assert "--data" in done.stderr


@every(
    ("arguments", "words"),
    [(["--method", "magic"], "magic"), (["--avg-bits", "3", "99"], "99"), (["--samples", "0"], "0 is not allowed")],
)
def test_wrong_options_are_told_before_any_work(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ptq as program

    with pytest.raises(SystemExit) as end:
        program.main(arguments)
    assert words in end.value.code
    assert "\n" not in end.value.code


@needs_data
def test_calibration_images_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import networks

    train, test = networks.load_cifar10(DATA)
    first, again, other = train.sample(64, 0), train.sample(64, 0), train.sample(64, 1)
    assert (len(train), len(test), len(first)) == (2000, 1000, 64)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert len(torch.unique(first.x.flatten(1), dim=0)) == 64
    assert [len(y) for _, y in first.batches(48)] == [48, 16]


def test_shortcut_skips_pixels_and_pads_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import networks

    block = networks.Block(16, 32)
    x = torch.randn(2, 16, 8, 8)
    short = block._shortcut(x)
    assert short.shape == (2, 32, 4, 4)
    assert torch.equal(short[:, 8:24], x[:, :, ::2, ::2])
    assert not short[:, :8].any()
    assert not short[:, 24:].any()


def test_text_states_what_is_needed_to_judge_and_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ptq

    row = ptq.Row(
        "resnet20",
        "cet",
        "nearest",
        3.0,
        2.99,
        10.2,
        91.5,
        91.5,
        12.0,
        {"rounding (cet)": 9.0, "allocation (cet)": 3.0},
        900.0,
        7,
    )
    text = ptq.as_text([row], 1000, ptq.parser().parse_args(["--seed", "7"]), "python benchmarks/ptq.py --seed 7")
    # sqrt(0.915 * 0.085 / 1000) = 0.88 %
    for words in (
        "n = 1,000",
        "seed 7",
        "512 training images",
        "Command: python benchmarks/ptq.py --seed 7",
        "  0.9  ",
        "rounding (cet)",
        "75%",
    ):
        assert words in text
