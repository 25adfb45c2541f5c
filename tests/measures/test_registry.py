"""Measures by name: what comes first, what a new one takes, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import nets
import numpy as np
import pytest

from lightning_caq import measure, quantize, register_method
from lightning_caq.allocation import methods
from lightning_caq.allocation.tables import layer_table
from lightning_caq.errors import OptionError
from lightning_caq.measures import registry
from lightning_caq.measures.registry import (
    Measure,
    available_measures,
    get_measure,
    register_measure,
    required_measures,
)
from lightning_caq.network.layers import layer_weight
from lightning_caq.profile import CurvatureProfile


@pytest.fixture
def emptied(monkeypatch):
    """No measures or methods of other tests, and none left to them."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(methods, "_registered", {})


def _half_range(measurement, profile):
    weights = {x.name: layer_weight(measurement.model, x).detach() for x in measurement.rank_layers}
    half = {name: 0.5 * float(weight.abs().max()) for name, weight in weights.items()}
    return profile.with_rows(
        lambda row: replace(row, extra={**row.extra, "step": {b: half[row.name] / 2**b for b in measurement.bits}})
    )


def test_each_measure_comes_behind_those_it_needs():
    taken = []
    for item in required_measures(available_measures()):
        assert all(get_measure(name) in taken for name in item.needs | item.after)
        taken.append(item)
    assert len({x.name for x in taken}) == len(taken)
    assert {name for x in taken for name in x.names} == available_measures()


def test_the_measures_of_a_step_follow_each_other():
    steps = [item.step for item in required_measures(available_measures())]
    changes = sum(a != b for a, b in pairwise(steps))
    assert changes == len(set(steps)) - 1


def test_a_measure_that_comes_after_another_does_not_bring_it():
    assert "loss_change" not in {x.name for x in required_measures({"channel_groups"})}
    both = [x.name for x in required_measures({"channel_groups", "loss_change"})]
    assert both.index("loss_change") < both.index("channel_groups")


def test_all_figures_of_the_built_in_measures_are_fields():
    case = nets.make_case("mlp")
    for row in measure(case.net, case.batches, needs=available_measures(), bits=(2, 4)).layers:
        assert row.extra == {}


def test_a_registered_measure_is_taken_kept_and_allocated_by(emptied):
    register_measure(Measure("step", step="steps", take=_half_range))

    class Coarsest:
        needs = frozenset({"step"})

        def costs(self, profile, bits):
            return layer_table(profile, "step", bits)

    register_method("coarsest", Coarsest())
    case = nets.make_case("cnn")
    case.net.float()
    result = quantize(
        case.net, [x.float() for x in case.batches], method="coarsest", avg_bits=3, guard=False, rounding="nearest"
    )
    steps = np.array([list(row.extra["step"].values()) for row in result.profile.layers])
    assert (steps[:, 0] == 2 * steps[:, 1]).all()  # of 2 bits, and of 3
    assert CurvatureProfile.from_json(result.profile.to_json()) == result.profile
    assert result.plan.method == "coarsest"


def test_what_cannot_be_registered_or_ordered(emptied):
    for name in ("kappa", "trace"):
        with pytest.raises(OptionError, match=f"'{name}'.*built-in"):
            register_measure(Measure(name, step="", take=_half_range))
    with pytest.raises(OptionError, match="'My measure' is not allowed"):
        register_measure(Measure("My measure", step="", take=_half_range))
    with pytest.raises(OptionError, match="'curl' is not a known measure"):
        required_measures({"curl"})
    register_measure(Measure("hen", step="", take=_half_range, needs=frozenset({"egg"})))
    register_measure(Measure("egg", step="", take=_half_range, needs=frozenset({"hen"})))
    with pytest.raises(OptionError, match=r"'egg'.*'hen'.*need each other"):
        required_measures({"hen"})
