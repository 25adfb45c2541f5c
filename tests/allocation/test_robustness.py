"""Robustness against errors of measurement, on allocations that can be foreseen."""

from functools import partial

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.robustness import perturbed, robustness
from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature

one_layer_at_four_bits = partial(robustness, method="caq", bits=(2, 4), avg_bits=3.0)


def _profile(*gains, **values):
    """Two layers of one weight, whose costs are squares: the root of a gain is the carried error."""
    rows = (
        LayerCurvature(f"l{i}", 1, 1, 1, amplification=a, carried_error={2: a, 4: 0.25 * a}, **values)
        for i, a in enumerate(gains)
    )
    return CurvatureProfile(tuple(rows))


def test_only_layers_within_the_factor_of_the_first_move():
    # The gains of two layers can come nearer by twice a factor of 2: 4.5 times the gain is safe, 3.5 times is not.
    result = one_layer_at_four_bits(_profile(4.5, 1.0), draws=100)
    assert result.bits == {"l0": 4, "l1": 2}
    assert result.layers == ()
    result = one_layer_at_four_bits(_profile(3.5, 1.0), draws=300)
    assert result.layers == ("l0", "l1")
    # It takes the first layer down and the second one up: one draw in four.
    assert result.moved["l0"] == result.moved["l1"] == pytest.approx(0.25, abs=0.08)
    assert sum(draw != result.bits for draw in result.draws) / 300 == result.moved["l0"]


def test_a_factor_of_one_moves_nothing_and_a_seed_repeats():
    assert one_layer_at_four_bits(_profile(1.1, 1.0), factor=1.0).layers == ()
    first, again, other = (one_layer_at_four_bits(_profile(1.1, 1.0), seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.draws != other.draws


def test_curvature_and_stretch_are_off_by_the_factor_each_and_nothing_else_is():
    profile = _profile(1.0, 1.0, kappa=3.0, remainder=5.0, second_order={2: 1.0}, lipschitz=7.0, input_norm=11.0)
    rng, pairs = np.random.default_rng(0), set()
    for row in (row for _ in range(50) for row in perturbed(profile, 2.0, rng).layers):
        curvature, stretch = row.kappa / 3, row.lipschitz / 7
        assert (row.remainder / 5, row.second_order[2], row.amplification) == (curvature, curvature, stretch)
        assert (row.input_norm, row.carried_error) == (11.0, {2: stretch, 4: 0.25 * stretch})
        assert row.trace is None
        pairs.add((curvature, stretch))
    assert pairs == {(0.5, 0.5), (0.5, 2.0), (2.0, 0.5), (2.0, 2.0)}


@every("options", [{"factor": 0.5}, {"factor": float("nan")}, {"draws": 0}, {"method": "evolution"}])
def test_bad_options(options):
    with pytest.raises(OptionError, match=r"not allowed|searches"):
        one_layer_at_four_bits(_profile(1.0), **options)
