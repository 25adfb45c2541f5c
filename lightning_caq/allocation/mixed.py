"""Mixed inputs: the bits of every layer's weights and of its input, chosen together under a budget of operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import numpy as np

from lightning_caq.allocation.budget import Bops, Budget, SizeAndBops
from lightning_caq.allocation.methods import available_methods, get_method, is_search
from lightning_caq.allocation.solver.constraint import Constraint
from lightning_caq.allocation.solver.joint import JointChoices, solve_joint
from lightning_caq.allocation.solver.knapsack import solve
from lightning_caq.allocation.tables import layer_table
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.profile import CurvatureProfile, LayerCurvature
from lightning_caq.sizes import LayerSizes

MIXED: Final = "mixed"
UNIFORM = "uniform"
FIRST_INPUT_BITS = 8
NEEDS = frozenset({"activation_cost"})


def in_nat(method: str) -> bool:
    """Whether a method's costs are changes of the loss in nat, to which those of rounded inputs can be added.

    Example:
        >>> in_nat("cet"), in_nat("caq")
        (True, False)
    """
    return getattr(get_method(method), "in_nat", False)


def check_mixed(method: str) -> None:
    """Check that a method can allocate bits to inputs too.

    Raises:
        OptionError: If it cannot; the message says which methods can.

    Example:
        >>> check_mixed("cet")
    """
    if method != UNIFORM and not in_nat(method):
        able = ", ".join(repr(name) for name in available_methods() if name == UNIFORM or in_nat(name))
        raise OptionError(
            f"activation_bits='mixed' cannot be had with method {method!r}, whose costs are no changes of the loss in "
            f"nat, as those of rounded inputs are; choose from {able}, or give activation_bits as a whole number."
        )


def input_bits(layers: int, bits: int) -> tuple[int, ...]:
    """Bits of every layer's input: ``bits``, and 8 for the first layer, which takes the data itself.

    Args:
        layers: Number of layers.
        bits: Bit-width of the others.

    Example:
        >>> input_bits(3, 4)
        (8, 4, 4)
    """
    return tuple(FIRST_INPUT_BITS if index == 0 else bits for index in range(layers))


def input_candidates(
    layers: int, bits: Sequence[int], activation_bits: int | Literal["mixed"] | None
) -> tuple[tuple[int, ...], ...]:
    """Candidate bits of each layer's input, a row a layer; each column is the network with inputs of one bit-width.

    Args:
        layers: Number of layers; the input of the first in order of execution has 8 bits always.
        bits: Candidate bit-widths of weights, upwards; those from 2 up are the candidates of mixed inputs.
        activation_bits: What was asked for: one bit-width, ``"mixed"``, or ``None`` for float32, which has no rows.

    Example:
        >>> input_candidates(2, (1, 2, 4), "mixed"), input_candidates(2, (1, 2, 4), 6)
        (((8, 8), (2, 4)), ((8,), (6,)))
    """
    if activation_bits is None:
        return ()
    widths = [b for b in bits if b >= 2] if activation_bits == MIXED else [activation_bits]
    return tuple(zip(*(input_bits(layers, b) for b in widths), strict=True))


def choose_mixed(
    method: str,
    budget: Budget,
    *,
    profile: CurvatureProfile,
    sizes: LayerSizes,
    bits: Sequence[int],
    candidates: Sequence[Sequence[int]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bits of the weights and of the inputs of every layer, the cheapest together within a budget.

    The costs of inputs are the measured loss changes, none below 0: that a loss falls holds for the calibration samples
    at most. ``"uniform"`` gives all inputs the same bits: of the networks that fit, it is the one with the least
    Σ n_i (4^−b_i + 4^−a), as if every weight and the input that it meets were as noisy as their bits say.

    Args:
        method: Name of a method that ``check_mixed`` lets pass.
        budget: A budget of operations, or of size and operations.
        profile: What was measured, ``activation_cost`` among it.
        sizes: Numbers of weights and operations of the layers.
        bits: Candidate bit-widths of weights.
        candidates: Those of inputs, from ``input_candidates``.

    Raises:
        BudgetError: If no choice keeps the budget, or it says nothing about operations.
        OptionError: If the method cannot take part.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> costs = {"second_order": {2: 4.0, 4: 1.0}, "activation_cost": {2: 1.0, 4: 0.9}}
        >>> profile = CurvatureProfile(tuple(LayerCurvature(name, 1, 1, 1, **costs) for name in "ab"))
        >>> sizes = LayerSizes((1, 1), (1, 1), macs=(10**9, 10**9))
        >>> limits = Bops(4 * 8 + 4 * 2)
        >>> choose_mixed("mckp", limits, profile=profile, sizes=sizes, bits=(2, 4), candidates=((8, 8), (2, 4)))
        ((4, 4), (8, 2))
    """
    check_mixed(method)
    if not isinstance(budget, (Bops, SizeAndBops)):
        raise BudgetError(f"{budget} says nothing about operations, by which bits of inputs are chosen; give bops.")
    choices = JointChoices(bits, candidates)
    if method == UNIFORM:
        return _uniform(budget, profile, sizes, choices)
    table_method = get_method(method)
    assert not is_search(table_method)
    weight_bits, inputs, _ = solve_joint(
        choices,
        table_method.costs(profile, bits),
        [_input_costs(row, widths) for row, widths in zip(profile.layers, candidates, strict=True)],
        _limits(budget, choices, sizes),
        names=[row.name for row in profile.layers],
    )
    return weight_bits, inputs


def _limits(budget: Bops | SizeAndBops, choices: JointChoices, sizes: LayerSizes) -> list[Constraint]:
    """The limits of a budget on pairs of bits; operations come first, as by them ties are broken."""
    operations = budget if isinstance(budget, Bops) else budget.bops
    limits = [choices.bops_limit(sizes.macs, operations.limit(sizes))]
    if isinstance(budget, SizeAndBops):
        limits += [choices.of_weights(limit) for limit in budget.size.constraints(sizes, choices.bits)]
    return limits


def _input_costs(row: LayerCurvature, bits: Sequence[int]) -> list[float]:
    """Costs of a layer's input in nat; a given input, the same in all columns, costs nothing that could be saved."""
    if len(set(bits)) == 1:
        return [0.0] * len(bits)
    (costs,) = layer_table(CurvatureProfile((row,)), "activation_cost", bits)
    return [max(float(cost), 0.0) for cost in costs]


def _uniform(
    budget: Budget, profile: CurvatureProfile, sizes: LayerSizes, choices: JointChoices
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Uniform bits of weights for each bit-width of inputs, and of these networks the least noisy one."""
    method = get_method(UNIFORM)
    assert not is_search(method)
    costs, names = method.costs(profile, choices.bits), [row.name for row in profile.layers]
    candidates: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    for inputs in map(tuple, np.transpose(choices.activation_bits).tolist()):  # the first takes the fewest operations
        limits = budget.constraints(replace(sizes, activation_bits=inputs), choices.bits)
        if candidates and any(limit.usage.min(1).sum() > limit.limit for limit in limits):
            break
        allocation = solve(costs, choices.bits, limits, names=names)
        noise = sum(n * 0.25**a for n, a in zip(sizes.weights, inputs, strict=True))
        candidates.append((allocation.cost + noise, allocation.bits, inputs))
    return min(candidates)[1:]
