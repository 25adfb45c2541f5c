"""What the artists of each figure hold, against numbers worked out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from lightning_caq.evaluation.loss_gap import LossGap
from lightning_caq.evaluation.shares import ErrorShare, SubspaceShare
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.reporting.figures.eigenpairs import eigenpair_curve
from lightning_caq.reporting.figures.kappa_vs_bits import kappa_vs_bits
from lightning_caq.reporting.figures.landscape import loss_landscape
from lightning_caq.reporting.figures.loss_gap import loss_gap
from lightning_caq.reporting.figures.pareto import pareto
from lightning_caq.reporting.figures.spectrum import spectrum
from lightning_caq.reporting.figures.subspace import subspace
from lightning_caq.reporting.figures.tightness import tightness_curves
from lightning_caq.reporting.figures.training import training_curves
from lightning_caq.reporting.figures.waterfall import error_waterfall
from lightning_caq.studies import Energy, EpochCurvature, Landscape, SweepPoint, Tightness


def words(figure) -> str:
    return " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_pareto_holds_a_curve_a_method_with_error_bars_and_the_float_line() -> None:
    points = [SweepPoint("cet", 2.0, 16.0, {"acc": x}) for x in (0.7, 0.8, 0.9)]
    points += [SweepPoint("cet", 4.0, 8.0, {"acc": 0.9}, chosen=True), SweepPoint("uniform", 3.0, 10.0, {"acc": 0.6})]
    (axes,) = pareto(points, {"acc": 0.95}).axes
    bars = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    np.testing.assert_allclose(bars["cet"].lines[0].get_xydata(), [[2, 0.8], [4, 0.9]])
    (whisker, point) = bars["cet"].lines[2][0].get_segments()
    np.testing.assert_allclose(whisker[:, 1], [0.8 - 0.1 / 3**0.5, 0.8 + 0.1 / 3**0.5])
    np.testing.assert_allclose(point[:, 1], 0.9)
    np.testing.assert_allclose(bars["uniform"].lines[0].get_xydata(), [[3, 0.6]])
    assert axes.lines[0].get_ydata() == [0.95, 0.95]
    rings = [line for line in axes.lines if line.get_markersize() > 10]
    assert [ring.get_xydata().tolist() for ring in rings] == [[[4, 0.9]]]
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"cet", "uniform", "float, 0.95"}


def test_pareto_leaves_out_what_has_no_metric_and_refuses_to_draw_nothing() -> None:
    points = [SweepPoint("cet", 2.0, 16.0, {"acc": math.nan}), SweepPoint("uniform", 2.0, 16.0, {"acc": 0.5})]
    (axes,) = pareto(points, {}).axes
    assert [c.get_label() for c in axes.containers] == ["uniform"]
    with pytest.raises(ValueError, match="finite value"):
        pareto(points[:1], {})


def test_pareto_of_one_size_keeps_its_points_together_and_apart_from_each_other() -> None:
    points = [SweepPoint(name, 2.5 + i / 1000, 12.0, {"acc": 0.9}) for i, name in enumerate(("cet", "uniform", "caq"))]
    (axes,) = pareto(points, {}).axes
    low, high = axes.get_xlim()
    assert low < 2.1 < 2.9 < high  # thousandths of a bit are no distance
    sizes = [c.lines[0].get_markersize() for c in axes.containers]
    assert sizes == sorted(set(sizes), reverse=True)  # none hides one that was drawn before


def test_training_holds_a_line_a_layer_and_a_panel_a_measure() -> None:
    kappa, trace = {"a": (3.0, 2.0, 1.0), "b": (5.0, math.nan, 7.0)}, {"a": (0.1, 0.2, 0.4), "b": (0.0, -1.0, math.inf)}
    epochs = [
        EpochCurvature(
            2 * i, {f"kappa/{n}": v[i] for n, v in kappa.items()} | {f"trace/{n}": v[i] for n, v in trace.items()}
        )
        for i in range(3)
    ]
    first, second = training_curves(epochs).axes
    assert (first.get_yscale(), second.get_yscale()) == ("log", "log")
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["κ (out²/in²)", "trace (nat/weight²)"]
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[0, 3], [2, 2], [4, 1]])
    np.testing.assert_array_equal(first.lines[1].get_ydata(), [5, math.nan, 7])
    np.testing.assert_array_equal(second.lines[0].get_ydata(), [0.1, 0.2, 0.4])
    assert np.isnan(second.lines[1].get_ydata()).all()  # a logarithmic axis has no place for them
    assert [t.get_text() for t in second.get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="monitor_every_n_epochs"):
        training_curves([])


def test_training_colours_many_layers_by_their_place() -> None:
    figures = {f"{measure}/l{i}": 1.0 + i for measure in ("kappa", "lipschitz", "trace") for i in range(20)}
    figure = training_curves([EpochCurvature(0, figures)])
    *panels, bar = figure.axes
    assert [len(axes.lines) for axes in panels] == [20, 20, 20]
    assert [t.get_text() for t in bar.get_yticklabels()] == ["l0", "l19"]
    lightness = [np.dot(line.get_color()[:3], (0.2126, 0.7152, 0.0722)) for line in panels[0].lines]
    assert lightness == sorted(lightness)


def test_eigenpairs_are_in_order_on_the_axis() -> None:
    points = [SweepPoint("cet", 3.0, 10.0, {"loss": 1 / k}, eigenpairs=k) for k in (200, 50, 100)]
    (axes,) = eigenpair_curve(points, {"loss": 0.001}).axes
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[50, 1 / 50], [100, 1 / 100], [200, 1 / 200]])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["50", "100", "200"]


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


def test_waterfall_adds_up_and_sorts() -> None:
    shares = [
        ErrorShare("a", 2, 1.0, 0.5),
        ErrorShare("b", 3, 4.0, None),
        ErrorShare("c", 4, 2.0, 2.5),
        ErrorShare("d", 4, None),
    ]
    figure = error_waterfall(shares)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "c", "a", "all layers"]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 4), (4, 2), (6, 1), (0, 7)]
    observed = np.ma.filled(axes.collections[-1].get_offsets(), np.nan)
    np.testing.assert_allclose(observed[:, 0], [np.nan, 6.5, 6.5])
    assert "1 layers were not measured" in words(figure)
    assert [t.get_text() for t in axes.texts if "%" in t.get_text()] == ["57.1%", "28.6%", "14.3%", "100%"]


def test_waterfall_groups_all_but_the_thirty_largest() -> None:
    figure = error_waterfall([ErrorShare(f"l{i}", 2, float(i + 1)) for i in range(40)])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()][-2:] == ["10 other layers", "all layers"]
    assert axes.patches[30].get_width() == sum(range(1, 11))
    assert axes.patches[31].get_width() == sum(range(1, 41))


def test_tightness_holds_errors_and_ratios_and_omits_what_is_unknown() -> None:
    found = {4: Tightness(0.5, 1.5, 1.0, 0.6, 0.5), 2: Tightness(2.0, 8.0, 5.0, 3.0, 2.5)}
    errors, ratios = tightness_curves(found).axes
    drawn = [line.get_xydata().tolist() for line in errors.lines]
    assert drawn == [
        [[2, 8.0], [4, 1.5]], [[2, 5.0], [4, 1.0]], [[2, 3.0], [4, 0.6]], [[2, 2.5], [4, 0.5]], [[2, 2.0], [4, 0.5]],
    ]  # fmt: skip
    np.testing.assert_allclose(ratios.lines[0].get_ydata(), [4, 3])
    assert "Lipschitz" not in " ".join(t.get_text() for t in ratios.get_legend().get_texts())


def test_tightness_of_the_plan_is_drawn_at_its_average_bits() -> None:
    plan = (2.5, Tightness(1.0, 4.0, 3.0, 2.0, 1.5, 50.0))
    errors, ratios = tightness_curves({}, plan).axes
    assert [line.get_xydata().tolist() for line in errors.lines] == [[[2.5, x]] for x in (50, 4, 3, 2, 1.5, 1)]
    assert [line.get_ydata()[0] for line in ratios.lines[:5]] == [50, 4, 3, 2, 1.5]
    with pytest.raises(ValueError, match="not compared"):
        tightness_curves({})


def test_loss_gap_tells_inside_from_outside_and_ends_bars_at_the_radius() -> None:
    gaps = [
        LossGap("a", 2, 4.0, 1.0, 3.0, True),
        LossGap("a", 3, 2.0, 0.25, 0.3, False),
        LossGap("a", 4, 1.0, 0.06, None, False),
        LossGap("b", 2, 8.0, 0.1, -0.02, True),
    ]
    figure = loss_gap(gaps)
    scatter, rows = figure.axes
    assert scatter.collections[0].get_offsets().tolist() == [[0.25, 0.3]]
    assert scatter.collections[1].get_offsets().tolist() == [[1.0, 3.0], [0.1, -0.02]]
    assert "2 of 3 measured changes are outside" in words(figure)
    (bar,) = rows.patches
    assert bar.get_x() + bar.get_width() == pytest.approx(2.0)
    assert [(t.get_text(), t.get_position()) for t in rows.texts] == [
        ("2", (4.0, 0)), ("3", (2.0, 0)), ("4", (1.0, 0)), ("2", (8.0, 1)),
    ]  # fmt: skip
    low, high = scatter.get_ylim()
    assert low < -0.02 < 3 < high


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


def test_landscape_holds_the_path_and_survives_losses_that_are_not_finite() -> None:
    axis = (-1.0, 0.0, 1.0)
    loss = tuple(tuple(math.inf if s == t == 1 else 4 * s * s + t * t for s in axis) for t in axis)
    figure = loss_landscape(Landscape(axis, axis, loss, (8.0, 2.0), ((0, 0), (0.2, 0.1), (0.4, 0.8)), 0.25))
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0, 0], [0.2, 0.1], [0.4, 0.8]]
    assert "25% of the whole rounding error's length" in words(figure)
    assert "short axis 8 nat/weight², along the long axis 2 nat/weight²" in words(figure)
    with pytest.raises(ValueError, match="finite"):
        loss_landscape(Landscape(axis, axis, ((math.nan,) * 3,) * 3, (1.0, 1.0)))
