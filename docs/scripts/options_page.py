"""Write docs/options.md, the page of all options, from the code that takes them.

python docs/scripts/options_page.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lightning_caq import CurvatureQuantizationCallback, quantize
from lightning_caq.options import QuantizationOptions
from lightning_caq.report import markdown_table
from lightning_caq.utilities.keywords import attribute_texts

PAGE = Path(__file__).parents[1] / "options.md"

MORE = {
    "method": "methods.md",
    "rounding": "rounding.md",
    "quantizer": "quantizers.md",
    "range": "quantizers.md",
    "symmetry": "quantizers.md",
    "group_size": "groups.md",
    "scale_dtype": "groups.md",
    "activation_bits": "quantizers.md#inputs-of-layers",
    "study": "gallery.md",
}
"""Option to the page that says more of it."""


def page() -> str:
    """The page as Markdown."""
    shared = {field.name: field.default for field in fields(QuantizationOptions)}
    assert MISSING not in shared.values()
    callback, function = _own(CurvatureQuantizationCallback, shared), _own(quantize, shared)
    return f"""# Options

<!-- Written by docs/scripts/options_page.py from the docstrings; change these and run it again. -->

`quantize()` and `CurvatureQuantizationCallback` take the same options, as keywords. From the command line they are
`--trainer.callbacks.<name>`, in YAML the entries of `init_args`; `--print_config` prints all of them.

{_table(shared, attribute_texts(QuantizationOptions))}

## Of the callback alone

{_table(callback, attribute_texts(CurvatureQuantizationCallback, "Args"))}

## Of `quantize()` alone

{_table(function, attribute_texts(quantize, "Args"))}
"""


def _own(taker: Callable[..., Any], shared: Iterable[str]) -> dict[str, Any]:
    """Keyword to default of what a function takes beside the options."""
    parameters = inspect.signature(taker).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in set(shared)}


def _table(defaults: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    rows = [[f"`{name}`", f"`{_default(value)}`", _text(name, texts[name])] for name, value in defaults.items()]
    return markdown_table(["option", "default", "what it does"], rows)


def _default(value: Any) -> str:
    return value.__name__ if callable(value) else re.sub(r"'", '"', repr(value))


def _text(name: str, text: str) -> str:
    """The text of the docstring, with one backquote where that has two, and a link to where there is more."""
    shown = text.replace("``", "`")
    return f"{shown} See [{MORE[name].split('#')[0]}]({MORE[name]})." if name in MORE else shown


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
