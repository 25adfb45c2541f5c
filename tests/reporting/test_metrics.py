"""Which metric leads, and which way is better."""

from __future__ import annotations

from lightning_caq.reporting.metrics import headline_metric, smaller_is_better


def test_headline_metric_prefers_an_accuracy() -> None:
    assert headline_metric(["val_loss", "val_acc"]) == "val_acc"
    assert headline_metric(["distill", "rmse", "mae"]) == "rmse"
    assert headline_metric(["distill"]) == "distill"
    assert headline_metric([]) is None


def test_losses_are_told_from_scores() -> None:
    assert [smaller_is_better(m) for m in ("val_loss", "rmse", "distill", "val_acc", "f1")] == [True] * 3 + [False] * 2
