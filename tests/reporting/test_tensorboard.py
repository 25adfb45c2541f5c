from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_caq.reporting.gallery import Gallery
from lightning_caq.reporting.tensorboard import log_to_tensorboard, summary
from lightning_caq.sizes import LayerSizes

FLOATS = {"conv1": torch.linspace(-1, 1, 6), "fc": torch.zeros(0)}
TAGS = [
    "bits",
    "curvature",
    "eigenpairs",
    "error_waterfall",
    "kappa_vs_bits",
    "landscape",
    "last_bit",
    "loss_gap",
    "pareto",
    "rate_distortion",
    "spectrum",
    "subspace",
    "tightness",
    "training",
]


@pytest.fixture
def events(tmp_path, plan, names, make_run) -> EventAccumulator:
    report, profile = make_run(names)
    with SummaryWriter(str(tmp_path)) as writer:
        log_to_tensorboard(writer, plan, profile, report, step=7, floats=FLOATS)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    return accumulator


def test_figures_are_in_the_event_file(events) -> None:
    assert sorted(events.Tags()["images"]) == [f"caq/{tag}" for tag in TAGS]
    for tag in events.Tags()["images"]:
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


def test_weights_before_and_after_are_histograms_and_empty_ones_are_left_out(events, names) -> None:
    tags = {f"caq/weights/{name}/after" for name in names} | {"caq/weights/conv1/before"}
    assert set(events.Tags()["histograms"]) == tags
    (before,) = events.Histograms("caq/weights/conv1/before")
    assert (before.histogram_value.min, before.histogram_value.max, before.histogram_value.num) == (-1, 1, 6)
    (after,) = events.Histograms("caq/weights/conv1/after")
    assert (after.histogram_value.sum, after.histogram_value.num) == (6, 6)


def test_only_the_largest_hundred_layers_get_histograms(tmp_path, plan, make_report, make_profile) -> None:
    layers = tuple(
        replace(plan.layers[0], name=f"l{i}", codes=torch.ones(1, i + 1, dtype=torch.uint8)) for i in range(130)
    )
    with SummaryWriter(str(tmp_path)) as writer:
        many = replace(plan, layers=layers, sizes=LayerSizes((1,) * 130, (1,) * 130))
        log_to_tensorboard(writer, many, make_profile(["a"]), make_report(["a"]), 0, gallery=Gallery())
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert set(accumulator.Tags()["histograms"]) == {f"caq/weights/l{i}/after" for i in range(30, 130)}
    assert accumulator.Tags()["images"] == []


def test_custom_scalars_show_a_family_a_chart(events) -> None:
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    families = {
        "bits a weight": "caq/bits/net.0",
        "κ (out²/in²)": "caq/kappa/net.0",
        "L (out/in)": "caq/lipschitz/net.0",
    }
    for title, tag in families.items():
        assert [re.fullmatch(pattern, tag) is not None for pattern in charts[title]] == [True]
        assert not any(re.fullmatch(pattern, "caq/training/kappa/net.0") for pattern in charts[title])


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
    assert r"| a\|b | conv2d | 100 | 10 % | 2 | 3 | 1 | 1 |" in text
    assert "1 repaired" in text
    assert text.endswith("- Not repaired.")
