"""Joint choices against every pair of every layer."""

from itertools import product

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.solver.constraint import size_limit
from lightning_caq.allocation.solver.joint import JointChoices, solve_joint
from lightning_caq.errors import BudgetError, OptionError

BITS, INPUTS = (2, 3, 4), (4, 6, 8)


def _problem(seed):
    """Three layers with falling costs, the first with an input of 8 bits."""
    rng = np.random.default_rng(seed)
    weights, macs = rng.integers(10, 100, 3), rng.integers(10, 100, 3)
    damage = [-np.sort(-rng.exponential(size=(3, 3)), axis=1) for _ in range(2)]
    damage[1][0] = 0.3  # the first layer's input is rounded to 8 bits whatever is chosen
    return weights, macs, damage[0], damage[1], [(8, 8, 8), INPUTS, INPUTS]


@every("seed", range(20))
def test_the_cheapest_of_all_pairs_within_both_limits(seed):
    n, m, w, a, inputs = _problem(seed)
    size, bops = 1.35 * 2 * n.sum(), 0.45 * (m * 4 * 8).sum()
    choices = JointChoices(BITS, inputs)
    bits, activation_bits, found = solve_joint(
        choices, w, a, [choices.of_weights(size_limit(n, BITS, size)), choices.bops_limit(m, bops)]
    )
    best = np.inf
    for pick in product(product(range(3), range(3)), repeat=3):
        b = np.array([BITS[i] for i, _ in pick])
        x = np.array([inputs[layer][j] for layer, (_, j) in enumerate(pick)])
        if (n * b).sum() <= size and (m * b * x).sum() <= bops:
            best = min(best, sum(w[layer, i] + a[layer, j] for layer, (i, j) in enumerate(pick)))
    assert np.isclose(found.cost, best, rtol=1e-5)
    assert activation_bits[0] == 8
    assert (n * bits).sum() == found.usage["size"] <= size
    assert (m * np.array(bits) * activation_bits).sum() == found.usage["bops"] <= bops
    own = sum(w[i, BITS.index(b)] for i, b in enumerate(bits))
    own += 0.3 + sum(a[i, INPUTS.index(x)] for i, x in enumerate(activation_bits) if i)
    assert np.isclose(own, found.cost)


def test_without_a_limit_on_operations_every_input_gets_the_most_bits():
    n, _, w, a, inputs = _problem(1)
    choices = JointChoices(BITS, inputs)
    _, activation_bits, _ = solve_joint(choices, w, a, [choices.of_weights(size_limit(n, BITS, 1e9))])
    assert activation_bits == (8, 8, 8)


def test_what_cannot_be_met():
    _, m, w, a, inputs = _problem(0)
    choices = JointChoices(BITS, inputs)
    with pytest.raises(BudgetError, match=r"The smallest choice takes .* bit operations, the budget allows 10"):
        solve_joint(choices, w, a, [choices.bops_limit(m, 10)])


def test_tables_that_do_not_fit():
    choices = JointChoices(BITS, [INPUTS, INPUTS])
    with pytest.raises(OptionError, match=r"weight_costs has shape \(2, 2\); it must be \(2, 3\)"):
        choices.costs(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(OptionError, match=r"activation_costs has shape \(3,\); it must be \(2, 3\)"):
        choices.costs(np.ones((2, 3)), np.ones(3))
    with pytest.raises(OptionError, match=r"usage of 'size' has shape \(2, 2\); it must be \(2, 3\)"):
        choices.of_weights(size_limit([1, 1], (2, 4), 9))
    with pytest.raises(OptionError, match="activation_bits must be a table"):
        JointChoices(BITS, INPUTS)
