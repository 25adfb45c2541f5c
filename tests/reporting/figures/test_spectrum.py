"""Signs and shares of eigenvalues, and the density where it was measured."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.reporting.figures.spectrum import spectrum


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_spectrum_tells_signs_and_shares() -> None:
    rows = (
        LayerCurvature("a", 300, 1, 1, subspace_curvature=1.0),
        LayerCurvature("b", 100, 1, 1, subspace_curvature=3.0),
        LayerCurvature("c", 100, 1, 1),
    )
    profile = CurvatureProfile(rows, eigenvalues=(4.0, -2.0, 1.0), trace=6.0, eigenvalue_residuals=(0.1, 0.1, 0.1))
    figure = spectrum(profile)
    values, shares = figure.axes
    assert [line.get_xydata().tolist() for line in values.lines[:2]] == [[[1, 4], [3, 1]], [[2, -2]]]
    assert values.get_yscale() == "symlog"
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([25, 75])
    np.testing.assert_allclose(shares.lines[0].get_xdata(), [75, 25])
    assert "hyperbolic paraboloid" in words(figure)
    assert "sum to 3 of a trace of 6 nat/weight² (50.0%)" in words(figure)
    assert spectrum(CurvatureProfile((), eigenvalues=(4.0, 1.0))).axes[0].get_yscale() == "log"


def test_spectral_density_is_drawn_with_its_standard_error_where_it_was_measured() -> None:
    density = ((-1.0, 0.0, 1.0), (0.01, 2.0, 0.1))
    profile = CurvatureProfile((), eigenvalues=(4.0, 1.0), density=density, density_stderr=(0.001, 0.2, 0.01))
    _, axes = spectrum(profile).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), np.transpose(density))
    band = axes.collections[0].get_paths()[0].vertices
    assert {round(y, 6) for _, y in band} >= {0.009, 0.011, 1.8, 2.2, 0.09, 0.11}


def test_spectrum_says_in_words_what_is_left_of_many_layers() -> None:
    rows = tuple(LayerCurvature(f"l{i}", 10, 1, 1, subspace_curvature=float(i)) for i in range(50))
    shares = spectrum(CurvatureProfile(rows, eigenvalues=(1.0,))).axes[-1]
    assert len(shares.patches) == 30
    assert shares.get_yticklabels()[-1].get_text() == "20 other layers"
    part = sum(range(20)) / sum(range(50))
    assert shares.texts[-1].get_text().strip() == f"together {part:.1%} of the curvature, 40.0% of the weights"
