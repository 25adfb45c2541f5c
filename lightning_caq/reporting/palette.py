"""Colours and marks that every figure shares: apart in lightness and shape too, for every kind of colour vision."""

from __future__ import annotations

# Light bars under dark points.
BAR, TOLERANCE, POINT = "#9ec5e8", "#1f4e79", "#b34700"
FAINT = "#bbbbbb"

# Okabe and Ito (2008), yellow left out: it is lost on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "*", "p")


def series_style(index: int) -> tuple[str, str]:
    """Colour and marker of the series of that number; 63 pairs before the first one comes again.

    Example:
        >>> series_style(0), series_style(7)
        (('#0072b2', 'o'), ('#0072b2', '*'))
    """
    return SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
