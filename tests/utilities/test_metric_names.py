from __future__ import annotations

import pytest

from lightning_caq.utilities.metric_names import direction_of_name

torchmetrics = pytest.importorskip("torchmetrics")


def test_names_agree_with_torchmetrics() -> None:
    """What the class of a metric says is the ground truth; a name may say nothing."""
    silent = 0
    for word in ("Accuracy", "Precision", "Recall", "MeanAbsoluteError", "MeanSquaredError", "CosineSimilarity"):
        wanted = getattr(torchmetrics, word).higher_is_better
        found = direction_of_name(f"val/{word}")
        silent += found is None
        assert wanted is None or found is None or found == ("max" if wanted else "min"), word
    assert silent == 0


def test_a_name_that_says_nothing_or_both_gives_nothing() -> None:
    for name in ("energy", "val_x", "terrain", "score", "accuracy_loss"):
        assert direction_of_name(name) is None, name


def test_words_count_whole() -> None:
    assert [direction_of_name(x) for x in ("mae", "valid/mae", "maelstrom", "acc", "facct")] == [
        "min", "min", None, "max", None,
    ]  # fmt: skip
