"""What the heatmap of bits holds and says."""

from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from readable import assert_readable, texts

from lightning_caq.evaluation.sweep import sweep_points
from lightning_caq.reporting.figures.bits import bits_heatmap
from lightning_caq.reporting.figures.curvature import curvature_bars

METRICS = {
    "float/val_loss": 0.31,
    "float/val_acc": 0.915,
    "quantized/val_loss": 0.32,
    "quantized/val_acc": 0.9171,
    "uniform/val_acc": 0.885,
}


MANY = [f"stage{1 + i // 20}.{i}.conv" for i in range(60)]


LONG = [f"{'module.' * 14}{i}.{'x' * 20}" for i in range(5)]


SIZES = pytest.mark.parametrize(
    "layers", [["fc"], MANY[:4], MANY[:20], MANY, LONG], ids=["1", "4", "20", "60", "long names"]
)


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


@SIZES
def test_heatmap_is_readable(layers, make_report) -> None:
    assert_readable(bits_heatmap(make_report(layers, METRICS)))


@SIZES
def test_heatmap_holds_the_bits_as_colours_and_as_numbers(layers, make_report) -> None:
    report = make_report(layers)
    figure = bits_heatmap(report)
    expected = [[row.bits["quantized"], row.bits["uniform"]] for row in report.layers]
    assert np.vstack(images(figure)).tolist() == expected
    for axes in (a for a in figure.axes if a.images):
        numbers = {t.get_position(): t.get_text() for t in axes.texts if isinstance(t.get_position()[0], int)}
        array = axes.images[0].get_array()
        for (i, j), bits in np.ndenumerate(array):
            assert numbers[j, i] == str(bits)


def test_colours_are_discrete_and_the_same_in_every_figure(make_report) -> None:
    def colour(layers: list[str], bits: int) -> tuple[float, ...]:
        axes = bits_heatmap(make_report(layers)).axes[0]
        return tuple(axes.images[0].cmap(axes.images[0].norm(bits)))

    few, many = MANY[:2], MANY[:6]
    assert colour(few, 2) == colour(many, 2)
    assert colour(few, 3) == colour(many, 3)
    lightness = [sum(colour(many, bits)[:3]) for bits in (2, 3, 4, 5, 6, 8)]
    assert lightness == sorted(lightness, reverse=True)
    assert len(set(lightness)) == 6


def test_numbers_stand_out_from_their_colour(make_report) -> None:
    axes = bits_heatmap(make_report(MANY[:6])).axes[0]
    image = axes.images[0]
    for text in (t for t in axes.texts if t.get_text().isdigit() and isinstance(t.get_position()[0], int)):
        j, i = text.get_position()
        back = luminance(image.cmap(image.norm(image.get_array()[i, j])))
        ink = luminance(mpl.colors.to_rgba(text.get_color()))
        low, high = sorted((back, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.1, contrast of normal text


def luminance(rgba: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_colour_bar_names_the_bits_that_occur(make_report) -> None:
    bar = bits_heatmap(make_report(MANY[:6])).axes[-1]
    assert [t.get_text() for t in bar.get_yticklabels()] == ["2", "3", "4", "5", "6", "8"]


def test_columns_say_bits_ratio_and_accuracy(make_report) -> None:
    words = [t.get_text() for t in texts(bits_heatmap(make_report(MANY[:4], METRICS)))]
    for word in ("quantized\n(cet)", "uniform", "2.96", "3.00", "10.3x", "10.1x", "0.9171", "0.885", "400"):
        assert word in words
    assert "val_acc (float 0.915)" in words


def test_the_chosen_network_has_one_column_where_its_method_was_also_compared_with(make_report) -> None:
    report = replace(make_report(MANY[:4], METRICS), method="uniform")  # as where uniform bits were better on a holdout
    (column,) = images(bits_heatmap(report))
    assert column[:, 0].tolist() == [row.bits["quantized"] for row in report.layers]
    assert column.shape == (4, 1)
    assert [point.method for point in sweep_points(report)] == ["uniform"]
    assert [row[0] for row in report.variant_cells()[1]] == ["float", "quantized (uniform)"]
    assert [title for title in report.layer_cells()[0] if "bits" in title] == ["bits"]


def test_heatmap_without_metrics_has_no_line_for_them(make_report) -> None:
    assert not any("float 0" in t.get_text() for t in texts(bits_heatmap(make_report(MANY[:4]))))


def test_a_layer_without_bits_is_a_dash(make_report) -> None:
    report = make_report(MANY[:3])
    first = replace(report.layers[0], bits={"quantized": 2})
    figure = bits_heatmap(replace(report, layers=(first, *report.layers[1:])))
    assert images(figure)[0].mask.tolist() == [[False, True], [False, False], [False, False]]
    assert "–" in [t.get_text() for t in texts(figure)]


def test_names_are_not_taken_for_formulas(make_report) -> None:
    assert_readable(bits_heatmap(make_report(["a$_b", r"c$\d$", "_x^{"])))


def test_drawing_leaves_pyplot_and_settings_alone(make_report, make_profile) -> None:
    import matplotlib.pyplot as plt

    report, profile = make_report(MANY[:4]), make_profile(MANY[:4])
    with mpl.rc_context({"axes.facecolor": "black", "text.color": "white", "font.size": 30}):
        figures = [bits_heatmap(report), curvature_bars(report, profile)]
        assert mpl.rcParams["font.size"] == 30
    assert plt.get_fignums() == []
    assert all(axes.get_facecolor() == (1, 1, 1, 1) for figure in figures for axes in figure.axes[:1])
