"""How to repeat a run: the text that does it again, for every way in which one can be started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_caq.allocation.methods import available_methods, get_method, is_search
from lightning_caq.options import QuantizationOptions
from lightning_caq.profile import CurvatureProfile
from lightning_caq.report import QuantizationReport

CLASS = "lightning_caq.CurvatureQuantizationCallback"
_NAMES = {x.name for x in fields(QuantizationOptions)}


@dataclass(frozen=True)
class Repeat:
    """Texts that repeat a run, each as it can be pasted.

    Attributes:
        yaml: A configuration of a LightningCLI.
        callback: Python that makes the callback, as ``callback``.
        function: Python that calls ``quantize`` on a float ``model`` and calibration ``batches``.
        allocation: The command that allocates the bits again from the profile, in the folder of the run; ``None`` where
            the method has no table of costs to do so.
    """

    yaml: str
    callback: str
    function: str
    allocation: str | None


def repeat(report: QuantizationReport, profile: CurvatureProfile | None = None) -> Repeat:
    """The texts that repeat a run.

    What a report cannot hold goes by a name: ``loss_fn``, and ``evaluate`` where the budget needs metrics.

    Args:
        report: The report of the run.
        profile: What was measured, if it lies in the folder of the run.

    Example:
        >>> texts = repeat(QuantizationReport("cet", "", (), {}, {}, options={"avg_bits": 3, "seed": 0}))
        >>> print(texts.yaml)
        trainer:
          callbacks:
            - class_path: lightning_caq.CurvatureQuantizationCallback
              init_args:
                avg_bits: 3
                seed: 0
        >>> print(texts.function)
        from lightning_caq import quantize
        <BLANKLINE>
        result = quantize(
            model,
            batches,
            avg_bits=3,
            seed=0,
        )
        >>> print(texts.callback)
        from lightning_caq import CurvatureQuantizationCallback
        <BLANKLINE>
        callback = CurvatureQuantizationCallback(
            avg_bits=3,
            seed=0,
        )
    """
    options = {name: value for name, value in report.options.items() if value is not None}
    asked = {name: value for name, value in options.items() if name in _NAMES}
    beside = {name: value for name, value in options.items() if name not in (*_NAMES, "loss_fn")}
    named = {
        "loss_fn": "loss_fn" in options or options.get("objective") == "task",
        "evaluate": "max_drop" in options,
    }
    callback = [*_keywords(asked | beside), *(["loss_fn=loss_fn"] if "loss_fn" in options else [])]
    function = ["model", "batches", *_keywords(asked), *(f"{name}={name}" for name, given in named.items() if given)]
    return Repeat(
        yaml=_yaml(options),
        callback=_call("CurvatureQuantizationCallback", "callback", callback),
        function=_call("quantize", "result", function),
        allocation=_allocation(report, profile, asked),
    )


def _yaml(options: Mapping[str, Any]) -> str:
    args = "".join(f"\n        {name}: {_scalar(value)}" for name, value in options.items())
    return f"trainer:\n  callbacks:\n    - class_path: {CLASS}\n      init_args:{args}"


def _scalar(value: Any) -> str:
    """A value as YAML; its numbers want a point where JSON's have none, as 1e-05 has."""
    text = json.dumps(value)
    return text.replace("e", ".0e", 1) if isinstance(value, float) and "e" in text and "." not in text else text


def _call(function: str, name: str, arguments: list[str]) -> str:
    lines = "".join(f"\n    {argument}," for argument in arguments)
    return f"from lightning_caq import {function}\n\n{name} = {function}({lines}\n)"


def _keywords(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


def _allocation(report: QuantizationReport, profile: CurvatureProfile | None, options: Mapping[str, Any]) -> str | None:
    method, size = options.get("method", ""), report.sizes.get("quantized")
    if profile is None or size is None or options.get("coding") == "entropy" or method not in available_methods():
        return None
    if is_search(get_method(method)) or not all(row.rounding_error for row in profile.layers):
        return None
    return f"lightning-caq allocate . --method={method} --avg_bits={options.get('avg_bits', size.avg_bits):.6g}"
