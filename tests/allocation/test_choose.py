"""Bits of groups of channels against all choices of a tiny network."""

import itertools

import numpy as np
import pytest
from every import every

from lightning_caq.allocation.budget import AvgBits, Ratio, SizeAndBops, make_budget
from lightning_caq.allocation.choose import Chooser, check_separable, group_sizes
from lightning_caq.errors import BudgetError, OptionError
from lightning_caq.options import QuantizationOptions
from lightning_caq.profile import ChannelGroup, CurvatureProfile, LayerCurvature
from lightning_caq.sizes import LayerSizes, average_bits, width_bits

BITS = (2, 3, 4)
CHANNELS = {"a": ((0, 2), (1, 3), (4, 5)), "b": ((0, 1, 2, 3),), "c": ((1, 2), (0, 3))}
PER_CHANNEL = {"a": 10, "b": 7, "c": 30}


def _row(name, weights, channels, draws, groups=()):
    noise = 0.25 ** np.array(BITS) * draws.uniform(0.1, 10)
    errors = dict(zip(BITS, noise.tolist(), strict=True))
    figures = {"rounding_error": errors, "second_order": errors, "subspace_energy": errors}
    return LayerCurvature(name, weights, channels, 3 * weights, groups=groups, **figures)


def _chooser(seed):
    draws, rows = np.random.default_rng(seed), []
    for name, groups in CHANNELS.items():
        each, count = PER_CHANNEL[name], sum(map(len, groups))
        parts = tuple(ChannelGroup(g, _row(f"{name}/{i}", each * len(g), len(g), draws)) for i, g in enumerate(groups))
        rows.append(_row(name, each * count, count, draws, parts))
    sizes = LayerSizes(
        tuple(r.weights for r in rows), tuple(r.channels for r in rows), 5, tuple(r.macs for r in rows), (8, 4, 4)
    )
    return Chooser(CurvatureProfile(tuple(rows)), sizes, BITS, 1.0, lambda bits: 0.0, 0, "channel_group")


def _every(chooser):
    """Every choice: its cost, its bits by layer and channel."""
    groups = [group for row in chooser.profile.layers for group in row.groups]
    owner = [row.name for row in chooser.profile.layers for _ in row.groups]
    for choice in itertools.product(BITS, repeat=len(groups)):
        by_layer = {row.name: [0] * row.channels for row in chooser.profile.layers}
        for name, group, b in zip(owner, groups, choice, strict=True):
            for c in group.channels:
                by_layer[name][c] = b
        yield sum(g.row.second_order[b] for g, b in zip(groups, choice, strict=True)) / 2, by_layer


def _expand(chooser, choice):
    pairs = zip(chooser.profile.layers, choice.bits, strict=True)
    return {row.name: [w] * row.channels if isinstance(w, int) else list(w) for row, w in pairs}


def _payload(by_layer):
    return sum(PER_CHANNEL[name] * sum(bits) for name, bits in by_layer.items())


@every("seed", range(4))
@every("avg_bits", [2, 2.3, 2.5, 3.7, 4])
def test_the_choice_is_the_cheapest_within_the_budget(seed, avg_bits):
    chooser = _chooser(seed)
    chosen = _expand(chooser, chooser.choose("mckp", AvgBits(avg_bits)))
    limit = avg_bits * sum(chooser.sizes.weights)
    best = min((cost, str(by_layer)) for cost, by_layer in _every(chooser) if _payload(by_layer) <= limit + 1e-9)
    assert best[1] == str(chosen)


@every("seed", range(4))
def test_a_ratio_counts_what_it_takes_to_say_which_channel_has_which_width(seed):
    chooser = _chooser(seed)
    for value in np.linspace(3.3, 4.3, 9):
        choice = chooser.choose("mckp", Ratio(float(value)))
        by_layer = _expand(chooser, choice)
        stored = _payload(by_layer) + sum(map(width_bits, choice.bits)) + 48 * sum(chooser.sizes.channels) + 32 * 5
        assert 32 * (sum(chooser.sizes.weights) + 5) / stored >= value
        assert chooser.sizes.avg_bits([average_bits(w) for w in choice.bits]) == _payload(by_layer) / sum(
            chooser.sizes.weights
        )


@every("seed", range(4))
def test_a_ratio_without_room_for_widths_of_channels_is_met_by_whole_layers(seed):
    chooser = _chooser(seed)
    smallest = [min(BITS)] * len(chooser.sizes.weights)
    assert list(chooser.choose("mckp", Ratio(chooser.sizes.ratio(smallest))).bits) == smallest


@every("seed", range(4))
def test_operations_are_those_of_the_channels(seed):
    chooser = _chooser(seed)
    budget = make_budget(bits=BITS, avg_bits=3.5, bops=2.5 * chooser.sizes.bops([1] * 3))
    assert isinstance(budget, SizeAndBops)
    by_layer = _expand(chooser, chooser.choose("cet", budget))
    inputs = dict(zip(by_layer, chooser.sizes.activation_bits, strict=True))
    done = sum(3 * PER_CHANNEL[n] * sum(bits) * inputs[n] for n, bits in by_layer.items()) / 1e9
    assert done <= budget.bops.value * (1 + 1e-12)


@every("seed", range(4))
def test_uniform_bits_are_those_of_whole_layers(seed):
    chooser = _chooser(seed)
    assert all(isinstance(width, int) for width in chooser.choose("uniform", AvgBits(2.6)).bits)


@every("seed", range(4))
def test_sizes_of_groups_add_up(seed):
    chooser = _chooser(seed)
    sizes = group_sizes(chooser.sizes, [row.groups for row in chooser.profile.layers])
    assert sum(sizes.weights) == sum(chooser.sizes.weights)
    assert sum(sizes.channels) == sum(chooser.sizes.channels)
    assert sizes.unquantized == 5
    assert sizes.activation_bits == (8, 8, 8, 4, 4, 4)
    assert sizes.widths == 24 + 16  # 18 and 12 bits in whole bytes; the layer of one group has one width


@every("seed", range(4))
def test_budgets_that_cannot_be_met(seed):
    chooser = _chooser(seed)
    with pytest.raises(BudgetError, match="The smallest choice takes"):
        chooser.choose("mckp", Ratio(30.0))


@every("seed", range(4))
@every("method", ["caq", "random_search", "hawq_v2", "cet_subspace"])
def test_methods_of_whole_layers_are_refused_before_any_work(method, seed):
    chooser = _chooser(seed)
    message = rf"granularity='channel_group' cannot be had with method '{method}'.*'cet', 'cet_expected'.*'mckp'"
    for attempt in (
        lambda: QuantizationOptions(method=method, avg_bits=3, granularity="channel_group"),
        lambda: QuantizationOptions(compare=[method], avg_bits=3, granularity="channel_group"),
        lambda: chooser.choose(method, AvgBits(3)),
    ):
        with pytest.raises(OptionError, match=message):
            attempt()


@every("method", ["cet", "cet_expected", "mckp", "uniform", "hessian_diagonal"])
def test_methods_of_groups(method):
    check_separable(method)
    assert QuantizationOptions(method=method, avg_bits=3, granularity="channel_group").granularity == "channel_group"


@every(
    ("options", "message"),
    [
        ({"avg_bits": 3, "granularity": "filter"}, "granularity='filter' is not known; choose from 'layer', 'channel_"),
        ({"error": 0.1, "granularity": "channel_group"}, "error= needs a method that composes errors of whole layers"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        QuantizationOptions(**options)
