import pytest

from lightning_caq.budget import AvgBits, LayerSizes, Ratio, check_budget, make_budget, overhead_bits
from lightning_caq.errors import BudgetError, CAQError, OptionError

BITS = (2, 3, 4, 8)
SIZES = LayerSizes(weights=(100, 300), channels=(10, 5))


def test_sizes_by_hand():
    assert overhead_bits(10) == 10 * (32 + 16)
    assert SIZES.overhead == 15 * 48
    assert SIZES.payload([8, 4]) == 800 + 1200
    assert SIZES.avg_bits([8, 4]) == 5
    assert SIZES.ratio([8, 4]) == pytest.approx(32 * 400 / (2000 + 720))


def test_excluded_layers_count_in_float():
    sizes = LayerSizes((100, 300), (10, 5), unquantized=50)
    assert sizes.avg_bits([8, 4]) == 5  # of the quantized weights
    assert sizes.ratio([8, 4]) == pytest.approx(32 * 450 / (2000 + 720 + 32 * 50))


@pytest.mark.parametrize("unquantized", [0, 70])
def test_limits_are_what_keeps_the_budget(unquantized):
    sizes = LayerSizes((100, 300), (10, 5), unquantized)
    assert AvgBits(3.5).limit(sizes) == 1400
    for ratio in (3.0, 4.5, 5.0):
        limit = Ratio(ratio).limit(sizes)
        total = 32 * (400 + unquantized)
        assert total / (limit + sizes.overhead + 32 * unquantized) == pytest.approx(ratio)


def test_in_words():
    assert str(make_budget(2.25, None, BITS)) == "avg_bits=2.25"
    assert str(make_budget(None, 10, BITS)) == "ratio=10"


@pytest.mark.parametrize("avg_bits", [2, 2.5, 8])
def test_average_bits_within_the_candidates(avg_bits):
    assert make_budget(avg_bits, None, BITS) == AvgBits(avg_bits)


@pytest.mark.parametrize(
    ("avg_bits", "ratio", "message"),
    [
        (None, None, "Got no budget; give exactly one of avg_bits .* or ratio"),
        (3.0, 8.0, r"two budgets \(avg_bits=3.0, ratio=8.0\); give exactly one"),
        (1.99, None, "avg_bits=1.99 cannot be met.*from 2 to 8"),
        (8.01, None, "avg_bits=8.01 cannot be met"),
        (float("nan"), None, "avg_bits=nan cannot be met"),
        ("3", None, "avg_bits='3' is no number"),
        (None, True, "ratio=True is no number"),
        (0, None, "avg_bits=0 cannot be met"),
        (-3, None, "avg_bits=-3 cannot be met"),
        (None, 1.0, "ratio=1 is not a compression"),
        (None, 0, "ratio=0 is not a compression"),
        (None, -2, "ratio=-2 is not a compression"),
        (None, float("inf"), "ratio=inf is not a compression"),
        (None, float("nan"), "ratio=nan is not a compression"),
    ],
)
def test_bad_budgets(avg_bits, ratio, message):
    with pytest.raises(BudgetError, match=message) as error:
        make_budget(avg_bits, ratio, BITS)
    assert isinstance(error.value, OptionError)
    assert isinstance(error.value, CAQError)
    assert isinstance(error.value, ValueError)


def test_a_ratio_between_the_extremes_can_be_met():
    most, least = SIZES.ratio([2, 2]), SIZES.ratio([8, 8])
    for ratio in (most - 1e-9, (most + least) / 2, least):
        check_budget(Ratio(ratio), SIZES, BITS)


def test_a_ratio_out_of_reach_names_the_nearest():
    with pytest.raises(BudgetError, match=r"ratio=20 cannot be met: with every layer at 2 bits.*ratio=8.421"):
        check_budget(Ratio(20), SIZES, BITS)
    with pytest.raises(BudgetError, match=r"ratio=2 is already met with every layer at 8 bits \(ratio=3.265\)"):
        check_budget(Ratio(2), SIZES, BITS)
