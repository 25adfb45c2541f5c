"""Names of metrics: whether more or less of what they name is better."""

from __future__ import annotations

import re
from typing import Literal

Direction = Literal["max", "min"]

_PARTS = {
    "min": ("loss", "error", "perplexity", "entropy", "distance", "divergence", "distill"),
    "max": ("accuracy", "precision", "recall", "similarity", "auroc"),
}
_WORDS = {
    "min": ("err", "mse", "mae", "rmse", "mape", "nll", "bce", "ce", "kl", "ppl", "wer", "cer", "fid", "lpips", "task"),
    "max": ("acc", "top1", "top5", "f1", "auc", "iou", "miou", "dice", "map", "r2", "psnr", "ssim", "bleu", "rouge"),
}


def direction_of_name(name: str) -> Direction | None:
    """Whether a good network has much (``"max"``) or little (``"min"``) of a metric, judged by its name.

    Args:
        name: The metric as it is logged.

    Returns:
        The direction; ``None`` where the name says nothing, or both.

    Example:
        >>> [direction_of_name(x) for x in ("val_loss", "valid/MAE", "val_acc", "cer@1", "energy", "f1_loss")]
        ['min', 'min', 'max', 'min', None, 'min']
    """
    lowered = name.lower()
    by_part: set[Direction] = {way for way in ("min", "max") if any(part in lowered for part in _PARTS[way])}
    words = set(re.split(r"[^a-z0-9]+", lowered))
    by_word: set[Direction] = {way for way in ("min", "max") if words & set(_WORDS[way])}
    ways = by_part or by_word
    return ways.pop() if len(ways) == 1 else None
