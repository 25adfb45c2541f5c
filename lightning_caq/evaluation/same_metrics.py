"""Metrics that quantization did not change, and whether validation ran the quantized layers at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_caq.notes import Note
from lightning_caq.quantizers.fake_quant.state import rounding_state
from lightning_caq.quantizers.fake_quant.swap import quantized_modules
from lightning_caq.utilities.contexts import Evaluate


class WatchedEvaluation:
    """An evaluation that notes whether it calls quantized layers.

    Args:
        evaluate: Metrics of a network.

    Attributes:
        bypasses: Whether a network with quantized layers was evaluated last without a call of any of them.

    Example:
        >>> evaluation = WatchedEvaluation(lambda model: {"acc": 0.5})
        >>> from lightning_caq import quantize
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = quantize(net, [torch.randn(32, 2)], avg_bits=4)
        >>> evaluation(net), evaluation.bypasses
        ({'acc': 0.5}, True)
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.bypasses = False

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """Metrics of a network."""
        modules, calls = quantized_modules(model).values(), []

        def hook(module: nn.Module, args: object) -> None:
            if rounding_state(module).quantizing:
                calls.append(module)

        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(hook).remove)
            metrics = self._evaluate(model)
        self.bypasses = bool(modules) and not calls
        return metrics


def same_metrics_note(
    before: Mapping[str, float], after: Mapping[str, float], *, leave: str, bypasses: bool
) -> tuple[Note, ...]:
    """What to say where the float and the quantized network have the same metrics to the last digit.

    Args:
        before: Metrics of the float network.
        after: Those of the quantized one.
        leave: The metric that is always there, the calibration objective; it does not come from validation.
        bypasses: Whether validation called no quantized layer.

    Example:
        >>> note, = same_metrics_note({"kl": 0.0, "acc": 0.5}, {"kl": 0.1, "acc": 0.5}, leave="kl", bypasses=True)
        >>> note.severity
        'warning'
    """
    names = [name for name in before if name != leave and name in after]
    if not names or any(before[name] != after[name] for name in names):
        return ()
    text = f"Float and quantized network have the same metrics to the last digit ({', '.join(names)})"
    if not bypasses:
        return (Note(f"{text}."),)
    return (
        Note(
            f"{text}, and validation calls none of the quantized layers: it judges other weights, such as those of an "
            "averaged copy. Let validation run the network that is quantized, or deployed=[...] name the copy.",
            "warning",
        ),
    )
