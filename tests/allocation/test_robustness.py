import numpy as np
import pytest
from every import every

from lightning_caq.allocation.methods import get_method
from lightning_caq.allocation.solver.robustness import robustness
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature

BITS = (2, 4)


def _profile(*gains, **values):
    errors = {2: 1.0, 4: 0.25}
    rows = (
        LayerCurvature(f"l{i}", 1, 1, 1, amplification=a, carried_error={b: a * e for b, e in errors.items()}, **values)
        for i, a in enumerate(gains)
    )
    return CurvatureProfile(tuple(rows))


def _costs(profile):
    return get_method("caq").costs(profile, BITS)


def _one_at_four_bits(table):
    """The best allocation with a single layer at 4 bits."""
    gains = table[:, 0] - table[:, 1]
    return tuple(4 if i == gains.argmax() else 2 for i in range(len(table)))


def test_only_layers_within_the_factor_of_the_first_move():
    # The gains of two layers can come nearer by twice a factor of 2: 4.5 times the gain is safe, 3.5 times is not.
    found = robustness(_profile(4.5, 1.0), _costs, _one_at_four_bits, draws=100)
    assert found.bits == {"l0": 4, "l1": 2}
    assert found.layers == ()
    found = robustness(_profile(3.5, 1.0), _costs, _one_at_four_bits, draws=400)
    assert found.layers == ("l0", "l1")
    # It takes the first layer down and the second one up: one draw in four.
    assert found.moved["l0"] == found.moved["l1"] == pytest.approx(0.25, abs=0.07)
    assert sum(draw != found.bits for draw in found.draws) / 400 == found.moved["l0"]


def test_a_factor_of_one_moves_nothing_and_a_seed_repeats():
    assert robustness(_profile(1.1, 1.0), _costs, _one_at_four_bits, factor=1.0).layers == ()
    first, again, other = (robustness(_profile(1.1, 1.0), _costs, _one_at_four_bits, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.draws != other.draws


def test_curvature_and_stretch_are_off_by_the_factor_each_and_nothing_else_is():
    profile = _profile(1.0, 1.0, kappa=3.0, remainder=5.0, lipschitz=7.0, input_norm=11.0)
    seen = []
    robustness(profile, lambda p: seen.append(p) or _costs(p), _one_at_four_bits, draws=50)
    rows = [row for p in seen[1:] for row in p.layers]
    pairs = set()
    for row in rows:
        curvature, stretch = row.kappa / 3, row.lipschitz / 7
        assert (row.remainder / 5, row.amplification) == (curvature, stretch)
        assert (row.input_norm, row.carried_error) == (11.0, {2: stretch, 4: 0.25 * stretch})
        pairs.add((curvature, stretch))
    assert pairs == {(0.5, 0.5), (0.5, 2.0), (2.0, 0.5), (2.0, 2.0)}
    assert seen[0] is profile


def test_what_is_not_measured_stays_so():
    seen = []
    robustness(_profile(1.0), lambda p: seen.append(p) or _costs(p), _one_at_four_bits, draws=2)
    assert all(p.layers[0].kappa is None for p in seen)


@every("options", [{"factor": 0.5}, {"factor": float("nan")}, {"draws": 0}])
def test_bad_options(options):
    with pytest.raises(OptionError, match="not allowed"):
        robustness(_profile(1.0), _costs, _one_at_four_bits, **options)


def test_floors_by_hand():
    rows = [
        LayerCurvature("bent", 1, 1, 1, remainder=2.0, diameter=8.0),  # ½ log2(2 · 64 / ½) = 4
        LayerCurvature("nearly straight", 1, 1, 1, remainder=1e-3, diameter=1.0),
        LayerCurvature("straight", 1, 1, 1, remainder=0.0, diameter=8.0),
    ]
    for method in ("caq", "caq_bound"):
        np.testing.assert_allclose(get_method(method).floors(CurvatureProfile(tuple(rows)), 0.5), [4, 0, 0])


def test_floors_hold_for_a_parabola():
    """f(z) = ρ z² on [0, d] leaves its chords over a grid of 2^p steps by ρ (d / 2^p)² / 4: below ε at the floor."""
    rho, d, epsilon = 3.0, 2.0, 0.01
    profile = CurvatureProfile((LayerCurvature("f", 1, 1, 1, remainder=rho, diameter=d),))
    p = get_method("caq").floors(profile, epsilon)[0]
    for bits, enough in ((np.ceil(p), True), (np.floor(p) - 1, False)):
        z = np.linspace(0, d, 100_001)
        knots = np.linspace(0, d, int(2**bits) + 1)
        assert (np.abs(np.interp(z, knots, rho * knots**2) - rho * z**2).max() <= epsilon) == enough
