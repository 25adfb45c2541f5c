"""Choice: the bits that a method gives every layer, or every group of channels, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lightning_caq.allocation.budget import Budget, ErrorBudget
from lightning_caq.allocation.methods import ComposingMethod, available_methods, get_method, is_search
from lightning_caq.allocation.mixed import choose_mixed
from lightning_caq.allocation.search import search_space
from lightning_caq.allocation.solver.knapsack import smallest, solve
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.profile import ChannelGroup, CurvatureProfile
from lightning_caq.sizes import LayerSizes, Width, width_bits

Bits = tuple[int, ...]

GRANULARITIES = ("layer", "channel_group")
_OF_GROUPS = frozenset({"rounding_error", "diagonal", "subspace", "loss_change"})


class Choice(NamedTuple):
    """What one allocation gives the layers.

    Attributes:
        bits: Bits of each layer's weights.
        inputs: Bits of each layer's input; empty where inputs stay in float32.
    """

    bits: tuple[Width, ...]
    inputs: Bits = ()


def check_separable(method: str) -> None:
    """Check that a method can allocate bits to groups of channels: it needs only what is measured of groups.

    Raises:
        OptionError: If it cannot; the message says which methods can.

    Example:
        >>> check_separable("cet")
    """
    if not _separable(method):
        able = ", ".join(repr(name) for name in available_methods() if _separable(name))
        raise OptionError(
            f"granularity='channel_group' cannot be had with method {method!r}, whose costs are those of whole layers; "
            f"choose from {able}, or granularity='layer'."
        )


def composing_method(name: str, budget: ErrorBudget) -> ComposingMethod:
    """The method that predicts the error which a budget limits.

    Raises:
        BudgetError: If the method of that name predicts none.

    Example:
        >>> "amplification" in composing_method("caq", ErrorBudget(0.05)).needs
        True
    """
    method = get_method(name)
    if not isinstance(method, ComposingMethod):
        raise BudgetError(f"{budget} needs a method that composes errors, such as 'caq'; got {name!r}.")
    return method


def _separable(name: str) -> bool:
    method = get_method(name)
    return not is_search(method) and method.needs <= _OF_GROUPS


@dataclass(frozen=True)
class Chooser:
    """What every choice of bits for one network is made from.

    Attributes:
        profile: What was measured.
        sizes: Numbers of weights and operations of the layers.
        bits: The candidate bit-widths.
        output_norm: Root mean square norm of the network's outputs, by which an error budget is counted.
        evaluate: The calibration objective of an allocation with nearest rounding, for methods that search.
        seed: Seed of a search.
        granularity: What gets bits of its own, ``"layer"`` or ``"channel_group"``.
        inputs: Candidate bits of each layer's input, a row a layer, where they are chosen together with those of
            weights; empty where ``sizes`` says what they are.
    """

    profile: CurvatureProfile
    sizes: LayerSizes
    bits: Sequence[int]
    output_norm: float
    evaluate: Callable[[Bits], float]
    seed: int
    granularity: str = "layer"
    inputs: Sequence[Sequence[int]] = ()

    def choose(self, method: str, budget: Budget) -> Choice:
        """Bits of every layer's weights and of its input, in order.

        Args:
            method: Name of the method.
            budget: The budget; not a ``MaxDrop``, which is met by a search over size budgets.

        Returns:
            The bits; with groups of channels, one bit-width for each channel of a layer in which they differ.

        Raises:
            BudgetError: If no choice meets the budget, or the method cannot work within an error budget.
            OptionError: If the method cannot allocate to groups of channels, where these are asked for.

        Example:
            >>> from lightning_caq.allocation.budget import AvgBits
            >>> from lightning_caq.profile import LayerCurvature
            >>> rows = tuple(LayerCurvature(name, weights=10, channels=1, macs=10) for name in "ab")
            >>> chooser = Chooser(
            ...     profile=CurvatureProfile(rows),
            ...     sizes=LayerSizes((10, 10), (1, 1)),
            ...     bits=(2, 4),
            ...     output_norm=1.0,
            ...     evaluate=lambda bits: 0.0,
            ...     seed=0,
            ... )
            >>> chooser.choose("uniform", AvgBits(4))
            Choice(bits=(4, 4), inputs=())
        """
        if self.inputs:
            pairs = choose_mixed(
                method, budget, profile=self.profile, sizes=self.sizes, bits=self.bits, candidates=self.inputs
            )
            return Choice(*pairs)
        return Choice(self._weights(method, budget), self.sizes.activation_bits)

    def keeps(self, method: str, budget: ErrorBudget, bits: Sequence[Width]) -> bool:
        """Whether the error that a method predicts of whole layers' bits is within a budget."""
        costs = composing_method(method, budget).costs(self.profile, self.bits)
        total = sum(row[self.bits.index(b)] for row, b in zip(costs, bits, strict=True))  # Φ_rss²
        return bool(total <= (budget.value * self.output_norm) ** 2 * (1 + 1e-12))

    def _weights(self, method: str, budget: Budget) -> tuple[Width, ...]:
        """Bits of every layer's weights."""
        if self.granularity == "channel_group":
            check_separable(method)
        if self.granularity == "layer" or not get_method(method).needs:  # what measures nothing tells no groups apart
            return self._choose(method, budget, self.profile, self.sizes)
        groups = [row.groups for row in self.profile.layers]
        try:
            bits = iter(self._choose(method, budget, self.profile.by_group(), group_sizes(self.sizes, groups)))
        except BudgetError:  # no room to say which channel has which bits: all channels of a layer have the same then
            return self._choose(method, budget, self.profile, self.sizes)
        return tuple(_width(of_layer, [next(bits) for _ in of_layer]) for of_layer in groups)

    def _choose(self, name: str, budget: Budget, profile: CurvatureProfile, sizes: LayerSizes) -> Bits:
        """Bits of every row of a profile, of layers or of groups."""
        method, names = get_method(name), [row.name for row in profile.layers]
        constraints = budget.constraints(sizes, self.bits)
        if isinstance(budget, ErrorBudget):
            composing = composing_method(name, budget)
            epsilon = budget.value * self.output_norm
            # These costs are squares of output errors: their sum is Φ_rss².
            return smallest(
                composing.costs(profile, self.bits),
                self.bits,
                np.multiply.outer(np.asarray(sizes.weights), np.asarray(self.bits)),
                epsilon**2,
                floors=np.minimum(composing.floors(profile, epsilon), max(self.bits)).tolist(),
                names=names,
            ).bits
        if is_search(method):
            return method.search(profile, search_space(constraints, self.bits), self.evaluate, self.seed)
        return solve(method.costs(profile, self.bits), self.bits, constraints, names=names).bits


def group_sizes(sizes: LayerSizes, groups: Sequence[Sequence[ChannelGroup]]) -> LayerSizes:
    """Sizes of the groups of channels, and what it takes to say which channel has which bits.

    Args:
        sizes: Sizes of the layers.
        groups: The groups of each layer.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> groups = [ChannelGroup((i,), LayerCurvature(f"fc/{i}", 5, 1, 5)) for i in range(2)]
        >>> by_group = group_sizes(LayerSizes((10,), (2,)), [groups])
        >>> by_group.weights, by_group.channels, by_group.widths
        ((5, 5), (1, 1), 8)
    """
    rows = [group.row for of_layer in groups for group in of_layer]
    inputs = zip(sizes.activation_bits, groups, strict=True) if sizes.activation_bits else ()
    layers = zip(sizes.channels, groups, strict=True)
    return replace(
        sizes,
        weights=tuple(row.weights for row in rows),
        channels=tuple(row.channels for row in rows),
        macs=tuple(row.macs for row in rows) if sizes.macs else (),
        activation_bits=tuple(b for b, of_layer in inputs for _ in of_layer),
        widths=sum(width_bits((0,) * c) for c, of_layer in layers if len(of_layer) > 1),
    )


def _width(groups: Sequence[ChannelGroup], bits: Sequence[int]) -> Width:
    """The bits of a layer from those of its groups."""
    if len(set(bits)) == 1:
        return bits[0]
    by_channel = {channel: b for group, b in zip(groups, bits, strict=True) for channel in group.channels}
    return tuple(by_channel[channel] for channel in sorted(by_channel))
