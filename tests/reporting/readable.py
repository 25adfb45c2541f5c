"""Whether a figure can be read: its texts are on the page, and none lies on another."""

from __future__ import annotations

from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]


def assert_readable(figure: Figure) -> None:
    """No text leaves the figure, and no two texts lie on each other."""
    figure.canvas.draw()
    page = figure.bbox
    shown = [(t.get_text(), t.get_window_extent()) for t in drawn_texts(figure)]
    for text, box in shown:
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{text!r} is clipped"
    for (a, box_a), (b, box_b) in combinations(shown, 2):
        wide = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
        tall = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
        assert wide <= 1 or tall <= 3, f"{a!r} lies on {b!r}"  # ascenders may reach into the line above


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that are on the page; ticks outside an axis' limits are artists too, but are not drawn."""
    hidden: set[int] = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high or not tick.label1.get_visible():
                    hidden.add(id(tick.label1))
    return [t for t in texts(figure) if id(t) not in hidden]
