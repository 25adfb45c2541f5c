"""Vectors: a figure as SVG, in about half of the bytes that matplotlib writes."""

from __future__ import annotations

import re
from io import StringIO

import matplotlib as mpl
from matplotlib.figure import Figure

# What is only there for reading the file: a name on every group, each text in plain letters beside its glyphs, and
# groups in which nothing was drawn.
_NAMES = re.compile(r' id="[a-z0-9.]+_\d+"|<!--.*?-->', re.DOTALL)
_EMPTY = re.compile(r"<g\s*/>|<g>\s*</g>")
_GLYPH = re.compile(r'<use xlink:href="#(\S+)" transform="translate\((\S+)(?: (\S+))?\)"/>')
_STYLE = re.compile(r'style="[^"]*"')
# Scales are small numbers, of which every digit counts; all other ones are places on the page, in points or in
# hundredths of the size of a font.
_LONG = re.compile(r"scale\([^)]*\)|\d+\.\d{3,}")


def svg(figure: Figure) -> str:
    """A figure as SVG; the same figure gives the same text.

    Args:
        figure: The figure.

    Returns:
        The document.

    Example:
        >>> svg(Figure(figsize=(2, 1)))[:5]
        '<?xml'
    """
    drawn = StringIO()
    with mpl.rc_context({"svg.hashsalt": "caq"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return slim(drawn.getvalue())


def slim(document: str) -> str:
    """The same picture in fewer bytes: places to a hundredth of a point, no names on groups, short names of glyphs.

    Example:
        >>> slim('<g id="text_1"><use xlink:href="#DejaVuSans-61" transform="translate(61.279297 0)"/></g>')
        '<g><use href="#g61" x="61"/></g>'
        >>> slim('<path d="M 1.23456 2" transform="scale(0.015625)"/>')
        '<path d="M 1.23 2" transform="scale(0.015625)"/>'
    """
    text = _NAMES.sub("", document).replace("DejaVuSans-", "g")
    text = _EMPTY.sub("", text)
    text = _LONG.sub(lambda found: found[0] if found[0].startswith("scale") else f"{float(found[0]):.2f}", text)
    text = _STYLE.sub(lambda found: found[0].replace("; ", ";").replace(": ", ":"), _GLYPH.sub(_placed, text))
    return re.sub(r"\s*\n\s*", "\n", text).replace(">\n<", "><")


def _placed(glyph: re.Match[str]) -> str:
    """A glyph that is moved by its own coordinates, hundredths of the size of its font, instead of a transformation."""
    name, *place = glyph.groups("0")
    moved = "".join(f' {axis}="{float(by):.0f}"' for axis, by in zip("xy", place, strict=True) if float(by))
    return f'<use href="#{name}"{moved}/>'
