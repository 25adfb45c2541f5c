"""The solver against brute force over every allocation."""

import itertools

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.solver.constraint import Constraint, bops_limit, size_limit
from lightning_caq.allocation.solver.knapsack import smallest, solve
from lightning_caq.errors import BudgetError, OptionError


def _choices(layers, count):
    return itertools.product(range(count), repeat=layers)


def _brute_force(costs, constraints, allowed=lambda choice: True):
    """The least cost of all allocations within the limits."""
    totals = (
        sum(costs[i][c] for i, c in enumerate(choice))
        for choice in _choices(len(costs), len(costs[0]))
        if allowed(choice) and all(each.total(choice) <= each.limit * (1 + 1e-12) for each in constraints)
    )
    return min(totals, default=None)


def _sized(costs, weights, bits, limit):
    return solve(costs, bits, [size_limit(weights, bits, limit)])


def _size(weights, bits):
    return sum(n * b for n, b in zip(weights, bits, strict=True))


def _case(seed):
    """A random table of up to six layers, of one of many kinds."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 7))
    bits = sorted(rng.choice([1, 2, 3, 4, 5, 6, 7, 8], size=rng.integers(1, 5), replace=False).tolist())
    weights = rng.integers(1, [10, 1000, 10**7][seed % 3], size=layers).tolist()
    costs = rng.exponential(size=(layers, len(bits))) * 10.0 ** rng.integers(-12, 6)
    kind = seed % 5
    if kind == 1:
        costs = -np.sort(-costs, axis=1)  # more bits help, as in practice; otherwise anything
    elif kind == 2:
        costs = rng.integers(0, 3, size=costs.shape).astype(float)  # ties and zeros
    elif kind == 3:
        costs *= 10.0 ** rng.uniform(-9, 9, size=(layers, 1))  # huge ranges
    elif kind == 4:
        costs = np.multiply.outer(rng.lognormal(0, 3, layers), 0.25 ** np.array(bits, dtype=float))
    return rng, costs, weights, bits


@every("seed", range(150))
def test_is_optimal_and_within_the_budget(seed):
    rng, costs, weights, bits = _case(seed)
    limit = rng.uniform(_size(weights, [bits[0]] * len(weights)), _size(weights, [bits[-1]] * len(weights)))
    found = _sized(costs, weights, bits, limit)
    assert _size(weights, found.bits) == found.usage["size"] <= limit == found.limit["size"]
    expected = _brute_force(costs, [size_limit(weights, bits, limit)])
    assert found.cost == pytest.approx(expected, rel=1e-6, abs=1e-300)
    assert found.cost == pytest.approx(sum(costs[i][bits.index(b)] for i, b in enumerate(found.bits)))
    assert found.relaxed <= found.bound <= expected * (1 + 1e-9)
    assert found.bound == pytest.approx(expected, rel=1e-5)
    assert found.gap == found.cost - found.relaxed


@every("seed", range(80))
def test_several_limits(seed):
    rng, costs, weights, bits = _case(seed)
    layers, least, most = len(weights), bits[0], bits[-1]
    macs, inputs = rng.integers(1, 10**6, layers), rng.choice([4, 8, 32], layers)
    constraints = [
        size_limit(weights, bits, rng.uniform(least, most) * sum(weights)),
        bops_limit(macs, inputs, bits, rng.uniform(least, most) * float(macs @ inputs)),
    ]
    if seed % 2:  # one that bits do not order, and that no whole numbers are
        usage = rng.exponential(size=costs.shape)
        constraints.append(Constraint("energy", usage, rng.uniform(usage.min(1).sum(), usage.max(1).sum())))
    expected = _brute_force(costs, constraints)
    if expected is None:
        with pytest.raises(BudgetError, match="No choice keeps all limits together"):
            solve(costs, bits, constraints)
        return
    found = solve(costs, bits, constraints)
    assert found.cost == pytest.approx(expected, rel=1e-5, abs=1e-300)
    assert found.relaxed <= found.bound <= expected * (1 + 1e-9)
    columns = [bits.index(b) for b in found.bits]
    for each in constraints:
        assert found.usage[each.name] == each.total(columns) <= each.limit * (1 + 1e-12)


@every("seed", range(80))
def test_the_smallest_within_an_error(seed):
    rng, costs, weights, bits = _case(seed)
    costs = np.abs(costs)
    error = float(rng.uniform(costs.min(1).sum(), costs.max(1).sum()))
    usage = size_limit(weights, bits, 0.0).usage
    if seed % 4 == 0:  # exactly the error of some choice
        error = float(costs[np.arange(len(costs)), rng.integers(len(bits), size=len(costs))].sum())
    found = smallest(costs, bits, usage, error)
    expected = _brute_force(usage, [Constraint("error", costs, error)])
    assert found.cost == pytest.approx(expected, rel=1e-6)
    assert found.relaxed <= found.bound <= expected
    assert found.usage["error"] <= error * (1 + 1e-12)


def test_smallest_and_solve_are_each_others_inverse():
    rng = np.random.default_rng(3)
    bits, weights = (2, 3, 4, 8), rng.integers(10, 1000, 30)
    costs = np.multiply.outer(rng.lognormal(0, 2, 30), 0.25 ** np.array(bits))
    size = size_limit(weights.tolist(), bits, float(3 * weights.sum()))
    best = solve(costs, bits, [size])
    back = smallest(costs, bits, size.usage, best.cost)
    assert back.cost <= best.usage["size"]
    assert back.usage["error"] == pytest.approx(best.cost)


@every("seed", range(40))
def test_pinned_layers_groups_and_floors(seed):
    rng = np.random.default_rng(seed)
    bits, weights = (2, 3, 5, 8), rng.integers(1, 50, 5).tolist()
    costs = -np.sort(-rng.exponential(size=(5, 4)), axis=1)
    pinned, groups = {int(rng.integers(5)): int(rng.choice(bits))}, [[0, 3], [4, 3]] if seed % 2 else [[1, 2]]
    floors = rng.uniform(0, 4, 5)
    floors[list(pinned)] = -np.inf
    size = size_limit(weights, bits, rng.uniform(2, 8) * sum(weights))

    def allowed(choice):
        got = [bits[c] for c in choice]
        return (
            all(got[i] == b for i, b in pinned.items())
            and all(len({got[i] for i in group}) == 1 for group in groups)
            and all(b >= floor for b, floor in zip(got, floors, strict=True))
        )

    expected = _brute_force(costs, [size], allowed)
    try:
        found = solve(costs, bits, [size], pinned=pinned, groups=groups, floors=floors)
    except OptionError:  # over the limit, or a pinned layer's group has a floor above
        assert expected is None
        return
    assert allowed([bits.index(b) for b in found.bits])
    assert found.cost == pytest.approx(expected, rel=1e-6)


@every("scale", [1, 10**3, 10**6, 10**8])
def test_a_budget_missed_by_one_bit_is_missed(scale):
    """Tolerances of a solver are relative: at millions of weights one bit is less than that."""
    weights, bits = [3 * scale + 1, 3 * scale], (2, 4)
    for limit, expected in ((_size(weights, (4, 2)), (4, 2)), (_size(weights, (4, 2)) - 1, (2, 4))):
        found = _sized([[5.0, 0.0], [4.0, 0.0]], weights, bits, limit)
        assert found.bits == expected
        twice = [size_limit(weights, bits, limit), bops_limit(weights, (8, 8), bits, 8 * limit)]
        assert solve([[5.0, 0.0], [4.0, 0.0]], bits, twice).bits == expected


@every("kind", ["wide", "alike", "anything"])
def test_a_thousand_layers(kind):
    """Optimal to the stated bound; the multiplier's bound is checked here, from the table alone."""
    rng, bits = np.random.default_rng(7), (1, 2, 3, 4, 5, 6, 7, 8)
    weights = (
        rng.choice([2304, 36864, 589824], 1000) if kind == "alike" else (10 ** rng.uniform(2, 6.5, 1000)).astype(int)
    )
    costs = np.multiply.outer(weights * rng.lognormal(0, 2, 1000), 0.25 ** np.array(bits))
    if kind == "anything":
        costs = rng.uniform(size=costs.shape)
    size = size_limit(weights.tolist(), bits, float(3 * weights.sum()))
    found = solve(costs, bits, [size])
    assert found.usage["size"] <= size.limit
    assert found.cost - found.bound <= 1e-6 * found.cost
    prices = np.geomspace(1e-12, 1e3, 4000)
    bound = max((costs + p * size.usage).min(1).sum() - p * size.limit for p in prices)
    assert bound <= found.relaxed + 1e-9 * found.cost
    assert found.relaxed <= found.cost <= bound * 1.01


def test_exact_budgets_can_be_used_up():
    assert _sized([[4.0, 1.0]] * 3, [7, 7, 7], [2, 4], 7 * (4 + 4 + 4)).bits == (4, 4, 4)
    assert _sized([[4.0, 1.0]] * 3, [7, 7, 7], [2, 4], 42.0).bits == (2, 2, 2)
    third = sum([10, 10, 10]) * (10 / 3)  # 3.333… bits a weight, with a rounding error in the limit
    assert _sized([[4.0, 1.0]] * 3, [10, 10, 10], [2, 6], third).bits.count(6) == 1


def test_is_the_same_every_time():
    costs = [[1.0, 1.0], [1.0, 1.0]]
    assert len({_sized(costs, [5, 5], [2, 4], 30).bits for _ in range(5)}) == 1


def test_costs_of_zero_and_below():
    assert _sized([[0.0, 0.0]], [5], [2, 4], 30).cost == 0
    assert _sized([[-1.0, -3.0], [2.0, -2.0]], [5, 5], [2, 4], 30).bits == (2, 4)


def test_without_limits_every_layer_has_its_cheapest_choice():
    assert solve([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]], (2, 3, 4), []).bits == (3, 2)


def test_equal_costs_use_the_budget():
    assert _sized([[0.0, 0.0, 0.0]] * 2, [10, 10], [2, 3, 4], 70).bits in {(3, 4), (4, 3)}
    assert _sized([[1.0, 1.0, 1.0]] * 3, [10, 10, 10], [2, 3, 4], 110).bits.count(4) == 2


def test_equal_sizes_take_the_smaller_error():
    assert smallest([[3.0, 1.0], [2.0, 1.0]], (2, 4), [[20, 40], [20, 40]], max_cost=3.5).bits == (4, 2)


def test_one_huge_cost_does_not_blur_the_others():
    """A choice that nobody can afford must not set the scale on which the others are compared."""
    draws, bits = np.random.default_rng(5), [2, 3, 4, 5, 6, 8]
    for _ in range(20):
        weights = draws.integers(10, 1000, 5)
        costs = np.multiply.outer(weights * draws.lognormal(0, 1, 5), 0.25 ** np.array(bits, dtype=float))
        costs[draws.integers(5), 0] *= 1e6
        constraints = [size_limit(weights.tolist(), bits, float(draws.uniform(5, 7.5)) * weights.sum())]
        best = _brute_force(costs, constraints)
        for limits in (constraints, [*constraints, bops_limit(weights, [8] * 5, bits, 8e9)]):
            found = solve(costs, bits, limits)
            assert found.cost == pytest.approx(best, rel=1e-5)
            assert found.bound <= best * (1 + 1e-9)


def test_budgets_that_cannot_be_met():
    size = size_limit([10, 10], (2, 4), 39)
    with pytest.raises(BudgetError, match="smallest choice takes 40 bits, the budget allows 39"):
        solve([[1.0, 1.0]] * 2, (2, 4), [size])
    size = size_limit([10, 10], (2, 4), 50)
    with pytest.raises(
        BudgetError, match=r"takes 60 bits, the budget allows 50\. Without .* takes 40; they bind conv1"
    ):
        solve([[1.0, 1.0]] * 2, (2, 4), [size], floors=[1.0, 2.5], names=["conv0", "conv1"])
    with pytest.raises(BudgetError, match=r"Floors above the largest bit-width, 4: layer 1 \(7.5\)"):
        solve([[1.0, 1.0]] * 2, (2, 4), [size], floors=[1.0, 7.5])
    with pytest.raises(BudgetError, match=r"No choice .* has an error of 1\.5; the least is 2"):
        smallest([[4.0, 1.0]] * 2, (2, 4), size.usage, 1.5)
    with pytest.raises(BudgetError, match="error of nan"):
        smallest([[4.0, 1.0]] * 2, (2, 4), size.usage, float("nan"))


@every("value", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite(value):
    with pytest.raises(ValueError, match="costs must be finite; row 1 is not"):
        _sized([[1.0, 1.0], [1.0, value]], [10, 10], [2, 4], 60)


@every(
    ("table", "arguments", "message"),
    [
        ([], {}, "a row for each layer"),
        ([[]], {}, "a row for each layer"),
        ([[1.0, 2.0, 3.0]] * 2, {}, r"a column for each of bits=\(2, 4\); its shape is \(2, 3\)"),
        ([[1.0, 2.0]] * 3, {}, "'size' has shape .* each of 3 layers"),
        ([[1.0, 2.0]] * 2, {"pinned": {0: 3}}, r"layer 0 is pinned to 3 bits, which are not among bits=\(2, 4\)"),
        ([[1.0, 2.0]] * 2, {"pinned": {2: 4}}, "no layer 2; indices go from 0 to 1"),
        ([[1.0, 2.0]] * 2, {"groups": [[0, -1]]}, "no layer -1"),
        ([[1.0, 2.0]] * 2, {"pinned": {0: 2}, "floors": [3.0, 1.0]}, "pinned to 2 bits, below its floor of 3"),
        ([[1.0, 2.0]] * 2, {"pinned": {0: 2, 1: 4}, "groups": [[0, 1]]}, "layer 0, layer 1 share their bits, but no"),
        ([[1.0, 2.0]] * 2, {"floors": [3.0]}, "floors has 1 entries for 2 layers"),
        ([[1.0, 2.0]] * 2, {"names": ["a"]}, "names has 1 entries for 2 layers"),
        ([[1.0, 2.0]] * 2, {"floors": [np.nan, 1.0], "names": ["a", "b"]}, "floor of a is not a number"),
    ],
)
def test_bad_arguments(table, arguments, message):
    with pytest.raises(OptionError, match=message):
        solve(table, (2, 4), [size_limit([10, 10], (2, 4), 80)], **arguments)


def test_negative_errors_and_usage_of_another_shape():
    with pytest.raises(OptionError, match="at least 0; row 1 is not"):
        smallest([[1.0, 0.0], [1.0, -1.0]], (2, 4), [[2, 4]] * 2, 1.0)
    with pytest.raises(OptionError, match=r"usage has shape \(1, 2\), costs have \(2, 2\)"):
        smallest([[1.0, 0.0]] * 2, (2, 4), [[2, 4]], 1.0)


@every("usage", [[[1.0, -1.0]], [[np.nan, 1.0]], [1.0, 2.0]])
def test_usage_must_be_a_table_of_numbers_from_zero_up(usage):
    with pytest.raises(OptionError, match="usage of 'energy' must be a table of finite numbers"):
        Constraint("energy", usage, 1.0)
    with pytest.raises(OptionError, match="limit of 'energy' is inf"):
        Constraint("energy", [[1.0]], np.inf)
