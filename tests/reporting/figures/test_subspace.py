"""Energies of both roundings."""

from __future__ import annotations

import numpy as np

from lightning_caq.evaluation.shares import SubspaceShare
from lightning_caq.reporting.figures.subspace import subspace
from lightning_caq.studies import Energy


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_subspace_holds_energies_of_both_roundings() -> None:
    shares = [
        SubspaceShare("a", 2, Energy(0.3, 0.1), Energy(0.01, 0.19)),
        SubspaceShare("b", 3, Energy(0.2, -0.2), None),
        SubspaceShare("c", 3, None, None),
    ]
    figure = subspace(shares)
    axes = figure.axes[0]
    drawn = [np.ma.filled(c.get_offsets(), np.nan)[:, 0] for c in axes.collections if len(c.get_offsets()) == 3]
    expected = [[0.3, 0.2, np.nan], [0.01, np.nan, np.nan], [0.1, 0.2, np.nan], [0.19, np.nan, np.nan]]
    np.testing.assert_allclose(drawn, expected)
    texts = [t.get_text() for t in axes.texts]
    assert texts == ["share of S", "75% → 5%", "50%", "–"]
    assert "in S 0.3 → 0.01 nat, outside 0.1 → 0.19 nat" in words(figure)
