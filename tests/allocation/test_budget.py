import pytest
from every import every

from lightning_caq.allocation.budget import (
    AvgBits,
    Bops,
    ErrorBudget,
    MaxDrop,
    Ratio,
    SizeAndBops,
    check_budget,
    make_budget,
)
from lightning_caq.errors import BudgetError, CAQError, OptionError
from lightning_caq.sizes import LayerSizes, overhead_bits

BITS = (2, 3, 4, 8)


SIZES = LayerSizes(weights=(100, 300), channels=(10, 5))


COUNTED = LayerSizes((100, 300), (10, 5), macs=(4 * 10**9, 10**9), activation_bits=(8, 4))


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


@every("unquantized", [0, 70])
def test_limits_are_what_keeps_the_budget(unquantized):
    sizes = LayerSizes((100, 300), (10, 5), unquantized)
    assert AvgBits(3.5).limit(sizes) == 1400
    for ratio in (3.0, 4.5, 5.0):
        limit = Ratio(ratio).limit(sizes)
        total = 32 * (400 + unquantized)
        assert total / (limit + sizes.overhead + 32 * unquantized) == pytest.approx(ratio)


def test_constraints_are_the_limits_in_the_solvers_terms():
    (size,) = AvgBits(3.5).constraints(SIZES, BITS)
    assert (size.name, size.limit, size.total([0, 3])) == ("size", 1400, 100 * 2 + 300 * 8)
    assert Ratio(4.5).constraints(SIZES, BITS)[0].limit == Ratio(4.5).limit(SIZES)
    size, bops = SizeAndBops(AvgBits(3.5), Bops(90.0)).constraints(COUNTED, BITS)
    assert (bops.name, bops.limit) == ("bops", 90e9)
    assert bops.total([0, 3]) == 4e9 * 8 * 2 + 1e9 * 4 * 8
    assert ErrorBudget(0.01).constraints(SIZES, BITS) == MaxDrop(0.01, "val_acc").constraints(SIZES, BITS) == ()


def test_bit_operations_by_hand():
    assert COUNTED.bops([2, 8]) == pytest.approx(4 * 8 * 2 + 1 * 4 * 8)
    in_float = LayerSizes((100, 300), (10, 5), macs=(4 * 10**9, 10**9))
    assert in_float.bops([2, 8]) == pytest.approx(32 * (4 * 2 + 1 * 8))


def test_in_words():
    for text, arguments in {
        "avg_bits=2.25": {"avg_bits": 2.25},
        "ratio=10": {"ratio": 10},
        "bops=1.5": {"bops": 1.5},
        "avg_bits=3, bops=1.5": {"avg_bits": 3, "bops": 1.5},
        "ratio=8, bops=1.5": {"ratio": 8, "bops": 1.5},
        "error=0.01": {"error": 0.01},
        "max_drop=0.005 (val_acc)": {"max_drop": 0.005, "monitor": "val_acc"},
    }.items():
        assert str(make_budget(bits=BITS, **arguments)) == text


@every("avg_bits", [2, 2.5, 8])
def test_average_bits_within_the_candidates(avg_bits):
    assert make_budget(avg_bits=avg_bits, bits=BITS) == AvgBits(avg_bits)


@every(
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
        make_budget(avg_bits=avg_bits, ratio=ratio, bits=BITS)
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


@every(
    ("arguments", "message"),
    [
        ({"error": 0.1, "avg_bits": 3}, r"Got two budgets \(avg_bits=3, error=0.1\); give exactly one"),
        ({"error": 0.1, "bops": 3}, "two budgets.*bops .* goes alone or with avg_bits or ratio"),
        ({"max_drop": 0.1, "monitor": "acc", "bops": 3}, "two budgets"),
        ({"avg_bits": 3, "ratio": 8, "bops": 3}, "Got 3 budgets"),
        ({"error": 0}, "error=0 is not an error; choose a finite value above 0"),
        ({"error": float("nan")}, "error=nan is not an error"),
        ({"bops": -1}, "bops=-1 is not a number of operations; choose a finite value above 0"),
        ({"bops": float("inf")}, "bops=inf is not"),
        ({"bops": True}, r"bops=True is no number; give one such as 1\.5"),
        ({"max_drop": -0.1, "monitor": "acc"}, "max_drop=-0.1 is not a drop; choose a finite value from 0 up"),
        ({"max_drop": 0.1}, "max_drop is given without monitor; give both"),
        ({"avg_bits": 3, "monitor": "acc"}, "monitor is given without max_drop"),
        ({"max_drop": 0.1, "monitor": ""}, "monitor='' is no name of a metric"),
    ],
)
def test_other_bad_budgets(arguments, message):
    with pytest.raises(BudgetError, match=message):
        make_budget(bits=BITS, **arguments)


def test_operations_out_of_reach_name_the_nearest():
    least, most = COUNTED.bops([2, 2]), COUNTED.bops([8, 8])
    for value in (least, (least + most) / 2):
        check_budget(Bops(value), COUNTED, BITS)
    with pytest.raises(BudgetError, match=r"bops=71 cannot be met: with every layer at 2 bits .* bops=72, the least"):
        check_budget(Bops(71), COUNTED, BITS)
    with pytest.raises(BudgetError, match=r"bops=289 is already met with every layer at 8 bits \(bops=288\)"):
        check_budget(Bops(289), COUNTED, BITS)
    with pytest.raises(BudgetError, match="multiply–accumulates are not known"):
        check_budget(Bops(1), SIZES, BITS)
    check_budget(SizeAndBops(AvgBits(3), Bops(500)), COUNTED, BITS)  # one of the two may be loose
    with pytest.raises(BudgetError, match="bops=71 cannot be met"):
        check_budget(SizeAndBops(AvgBits(3), Bops(71)), COUNTED, BITS)
    with pytest.raises(BudgetError, match="ratio=20 cannot be met"):
        check_budget(SizeAndBops(Ratio(20), Bops(100)), COUNTED, BITS)
    check_budget(ErrorBudget(0.01), SIZES, BITS)  # known only once errors are measured


def test_a_ratio_counts_tables():
    sizes = LayerSizes((400, 600), (20, 10), quantizer="lq_nets")
    ratio = sizes.ratio([3, 2])
    assert ratio == pytest.approx(32 * 1000 / (1200 + 1200 + 32 * (60 + 20)))
    limit = Ratio(ratio).constraints(sizes, (2, 3))[0]
    assert limit.total([1, 0]) == pytest.approx(limit.limit)
    check_budget(Ratio(ratio), sizes, (2, 3))
    with pytest.raises(BudgetError, match="cannot be met"):
        check_budget(Ratio(1.01 * sizes.ratio([2, 2])), sizes, (2, 3))
    with pytest.raises(BudgetError, match="already met"):
        check_budget(Ratio(0.99 * sizes.ratio([3, 3])), sizes, (2, 3))
    check_budget(AvgBits(2), sizes, (2, 3))  # tables are no part of the average


def test_a_ratio_counts_zero_points_of_groups():
    sizes = LayerSizes((640, 1280), (5, 10), groups=(2, 2), scale_bits=16)
    ratio = 32 * 1920 / (640 * 3 + 1280 * 2 + 30 * 16 + 40 + 64)  # zero points: 10 of 4 bits, 20 of 3 in whole bytes
    assert sizes.ratio([3, 2]) == pytest.approx(ratio)
    limit = Ratio(ratio).constraints(sizes, (2, 3))[0]
    assert limit.total([1, 0]) == pytest.approx(limit.limit)
    with pytest.raises(BudgetError, match="cannot be met"):
        check_budget(Ratio(1.01 * sizes.ratio([2, 2])), sizes, (2, 3))
