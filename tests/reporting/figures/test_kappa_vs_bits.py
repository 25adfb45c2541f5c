"""Points of κ against bits."""

from __future__ import annotations

import numpy as np

from lightning_caq.reporting.figures.kappa_vs_bits import kappa_vs_bits


def test_kappa_vs_bits_moves_points_apart_but_never_to_other_bits(make_run) -> None:
    report, profile = make_run([f"l{i}" for i in range(60)])
    (axes,) = kappa_vs_bits(report, profile).axes
    found = axes.collections[0].get_offsets()
    np.testing.assert_allclose(found[:, 0], [row.kappa for row in profile.layers])
    bits = np.array([row.bits["quantized"] for row in report.layers])
    assert np.abs(found[:, 1] - bits).max() < 0.5
    numbered = [t for t in axes.texts if t.get_text().isdigit()]
    places = np.array([axes.transData.transform(t.get_position()) for t in numbered])
    gaps = np.linalg.norm(places[:, None] - places[None], axis=2)[~np.eye(len(places), dtype=bool)]
    assert len(numbered) > 4
    assert gaps.min() > 9  # pixels at 120 a inch: about the width of two digits
