"""The page of options against the code it is written from."""

import inspect
import runpy
from pathlib import Path

from lightning_caq import CurvatureQuantizationCallback

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_script_writes_from_the_code():
    script = runpy.run_path(str(DOCS / "scripts" / "options_page.py"))
    assert (DOCS / "options.md").read_text(encoding="utf-8") == script["page"](), "run docs/scripts/options_page.py"


def test_the_page_names_every_argument_of_the_callback():
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    for name in inspect.signature(CurvatureQuantizationCallback).parameters:
        assert f"| `{name}` |" in page
