import pytest
from readable import assert_readable

from lightning_caq.reporting.figures.last_bit import last_bits
from lightning_caq.studies import LayerReason


def _reason(name, **values):
    known = {"fewer": 2, "more": 4, "damage": 1.0, "damage_fewer": 5.0, "damage_more": 0.5, "source": "modelled"}
    return LayerReason(name=name, method="cet", unit="nat", bits=3, weights=8000, **(known | values))


def test_marks_are_what_steps_buy_for_a_kilobyte() -> None:
    figure = last_bits([_reason("a"), _reason("b", damage_fewer=3.0), _reason("c", more=None, damage_more=None)])
    _, more, bought = figure.axes[0].lines
    assert bought.get_xdata().tolist() == [4.0, 2.0, 4.0]
    assert more.get_xdata()[:2].tolist() == [0.5, 0.5]
    assert more.get_xdata()[2] != more.get_xdata()[2]
    assert_readable(figure)


def test_a_method_without_costs_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="table of costs, such as method='cet'"):
        last_bits([_reason("a", damage=None)])
