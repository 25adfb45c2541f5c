"""Rows of a profile written by hand, and the table of costs that a method makes of them."""

from itertools import product

from lightning_caq.allocation.methods import get_method
from lightning_caq.profile import CurvatureProfile, LayerCurvature

BITS = (2, 4, 8)


def row(name, weights=100, **values):
    return LayerCurvature(name, weights=weights, channels=4, macs=weights, **values)


def by_bits(*values):
    return dict(zip(BITS, values, strict=True))


def costs_of(method, *rows, **values):
    return get_method(method).costs(CurvatureProfile(rows, **values), BITS)


def cheapest(method, profile, avg_bits):
    """The best allocation of all, by trying each; between equal ones the one with more bits."""
    costs = get_method(method).costs(profile, BITS)
    weights = [row.weights for row in profile.layers]
    feasible = [
        columns
        for columns in product(range(len(BITS)), repeat=len(weights))
        if sum(n * BITS[c] for n, c in zip(weights, columns, strict=True)) <= avg_bits * sum(weights)
    ]
    best = min(feasible, key=lambda cols: (sum(costs[i, c] for i, c in enumerate(cols)), [-c for c in cols]))
    return tuple(BITS[c] for c in best)
