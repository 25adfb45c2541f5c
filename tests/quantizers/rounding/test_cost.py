"""The count of multiplications against the shapes that rounding really multiplies."""

import pytest

from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.rounding.cost import rounding_multiplications, rounding_seconds


def _layer(outputs, columns, positions=1, groups=1):
    shape = (outputs, columns)
    return Layer("", "linear", shape, macs=outputs * columns * positions, calls=1, groups=groups)


def test_each_part_grows_as_its_products_do():
    wide = rounding_multiplications([_layer(10, 2000)], 10)
    assert wide == pytest.approx(2 * 2000**3, rel=0.1)  # factors of few samples' curvature
    many = rounding_multiplications([_layer(10, 100, positions=50)], 1000)
    assert many == pytest.approx(50_000 * 100 * 120, rel=0.05)  # moments of many positions
    assert rounding_multiplications([_layer(10, 100, positions=10_000)], 1000) == pytest.approx(1.3 * many, rel=0.1)
    assert rounding_multiplications([Layer("", "embedding", (500, 8), calls=1)], 10) == 0


def test_seconds_are_those_of_products_and_of_columns():
    layers = [_layer(10, 100, positions=50)]
    slow, fast = (rounding_seconds(layers, 1000, rate) for rate in (1e-9, 0.0))
    assert slow - fast == pytest.approx(1.3e-9 * rounding_multiplications(layers, 1000))
    assert fast > 0
