from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_caq.reporting.tensorboard import log_to_tensorboard, summary


@pytest.fixture
def events(tmp_path, plan, names, make_report, make_profile) -> EventAccumulator:
    with SummaryWriter(str(tmp_path)) as writer:
        log_to_tensorboard(writer, plan, make_profile(names), make_report(names, {"quantized/val_acc": 0.9}), step=7)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    return accumulator


def test_figures_are_in_the_event_file(events) -> None:
    assert sorted(events.Tags()["images"]) == ["caq/bits", "caq/curvature"]
    for tag in ("caq/bits", "caq/curvature"):
        (event,) = events.Images(tag)
        assert event.step == 7
        pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        assert pixels.shape[:2] == (event.height, event.width)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # a picture, not an empty page


def test_summary_is_in_the_event_file(events) -> None:
    (event,) = events.Tensors("caq/summary/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 7
    assert "| layer1.0.conv1 | conv2d |" in text


def test_there_is_one_run_and_no_scalars(events, tmp_path) -> None:
    assert events.Tags()["scalars"] == []
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    assert len(list(tmp_path.iterdir())) == 1


def test_summary_tables_are_well_formed(plan, names, make_report, make_profile) -> None:
    awkward = ["a|b", *names[1:]]
    report = replace(make_report(awkward, {"float/val_acc": 0.91, "quantized/val_acc": 0.9}), notes=("Not repaired.",))
    text = summary(replace(plan, repairs={"bn.bias": torch.zeros(2)}), make_profile(awkward), report)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 3, 2 + 4]
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1
    assert "| quantized (cet) | 2.96 | 10.26x | 0.4 | 0.9 |" in text
    assert r"| a\|b | conv2d | 100 | 1 | 1 | 2 | 3 |" in text
    assert "1 repaired" in text
    assert text.endswith("- Not repaired.")
