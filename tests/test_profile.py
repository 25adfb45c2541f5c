import json

import pytest
from every import every

from lightning_caq.profile import CurvatureProfile, LayerCurvature


def _row(name="fc", **values):
    return LayerCurvature(name, weights=10, channels=2, macs=20, **values)


def _full():
    row = _row(
        kappa=1.5, kappa_tolerance=1e-3, lipschitz=2.0, lipschitz_tolerance=1e-4, input_norm=3.0, diameter=4.0,
        remainder=0.1, trace=7.0, trace_stderr=0.0, rounding_error={2: 0.5, 4: 0.1}, output_error={2: 1.0, 4: 0.2},
        amplification=1.1, subspace_curvature=6.0, subspace_energy={2: 0.3, 4: 0.02}, first_order={2: -0.1, 4: 0.01},
        second_order={2: 0.4, 4: 0.05},
        loss_change={2: 0.9}, outside=(2,),
    )  # fmt: skip
    return CurvatureProfile((row, _row("out")), "task", 64, 3, (5.0, -2.0), 7.0, 0.25, 1.5)


def test_json_round_trip():
    profile = _full()
    text = profile.to_json()
    assert CurvatureProfile.from_json(text) == profile
    assert json.loads(text)["layers"][0]["rounding_error"] == {"2": 0.5, "4": 0.1}


def test_json_of_a_later_version_with_a_figure_more():
    data = json.loads(_full().to_json())
    data["layers"][0]["novelty"] = 1
    assert CurvatureProfile.from_json(json.dumps(data)) == _full()


def test_rows_by_name():
    assert _full()["out"].name == "out"


@every(
    ("values", "shape"),
    [
        ((), "not measured"),
        ((3.0, 1.0), "ellipsoid"),
        ((3.0, -1.0), "hyperbolic paraboloid"),
        ((3.0, 1.0, -1e-8), "ellipsoid"),  # a computed zero
        ((-3.0, -1.0), "hyperbolic paraboloid"),
    ],
)
def test_shape(values, shape):
    assert CurvatureProfile((), eigenvalues=values).shape == shape


def test_predictions_by_hand():
    profile = _full()
    assert profile.predicted_change("fc", 4) == pytest.approx(0.01 + 0.5 * 0.05)
    assert profile.predicted_change("fc", 2) == 0.9  # outside the quadratic model: what was measured
    assert profile.predicted_change("out", 4) is None
    assert profile.predicted_loss({"fc": 4}) == profile.predicted_change("fc", 4)
    assert profile.predicted_loss({"fc": 4, "out": 4}) is None


def test_validity_radius():
    assert _full()["fc"].validity_radius is None  # the model held at no bit-width that was measured
    row = _row(rounding_error={2: 4.0, 3: 1.0, 4: 0.25}, loss_change={2: 0.9, 3: 0.1}, outside=(2,))
    assert row.validity_radius == 1.0
