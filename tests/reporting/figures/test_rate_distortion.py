"""Networks that were tried, the bound, and the bits of layers."""

from __future__ import annotations

import pytest

from lightning_caq.reporting.figures.rate_distortion import rate_distortion
from lightning_caq.studies import LayerRate, RateLimit, RatePoint

ROWS = (
    LayerRate("a", 300, bits=2.0, limit=1.7, distortion=0.1),
    LayerRate("b", 100, bits=1.0, limit=0.5, distortion=1),
)
TRIED = (RatePoint(1.2, 0.3), RatePoint(1.75, 0.2), RatePoint(3.0, 0.1))


def test_the_bound_goes_through_the_limit_at_the_error_of_the_network_that_is_kept() -> None:
    curve, rows = rate_distortion(RateLimit(ROWS, TRIED)).axes
    bound, tried, kept = (line.get_xydata() for line in curve.lines)
    assert tried.tolist() == [[1.2, 0.3], [1.75, 0.2], [3.0, 0.1]]
    assert kept.tolist() == [[1.75, 0.2]]
    between = min(bound, key=lambda point: abs(point[1] - 0.2))
    assert between[0] == pytest.approx(1.4, abs=0.05)
    halved = min(bound, key=lambda point: abs(point[1] - 0.1))
    assert halved[0] - between[0] == pytest.approx(1.0, abs=0.05)  # half the error takes a bit
    assert [patch.get_width() for patch in rows.patches] == [2.0, 1.0]
    assert rows.lines[0].get_xdata().tolist() == [1.7, 0.5]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="coding='entropy'"):
        rate_distortion(None)
    with pytest.raises(ValueError, match="not known"):
        rate_distortion(RateLimit(ROWS))
