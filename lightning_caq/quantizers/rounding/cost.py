"""Cost of rounding: about how many multiplications it takes, so that its time can be told before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_caq.network.layers import Layer
from lightning_caq.quantizers.rounding.moments import most_columns

_DOUBLE = 2.0  # float64 takes twice the time
_SWEEPS = 6.0  # of the descent
_COLUMN_SECONDS = 6e-4  # what a column takes by itself, in feedback and in all sweeps
_NOT_PRODUCTS = 1.3  # what else is done with as many numbers


def rounding_seconds(layers: Sequence[Layer], samples: int, multiplication_seconds: float) -> float:
    """About how many seconds error feedback takes for a whole network, but for its passes.

    Args:
        layers: The layers, counted on a batch.
        samples: Samples that rounding is fitted to.
        multiplication_seconds: What one multiplication takes in a product of matrices.
    """
    columns = sum(layer.weights / layer.channels for layer in layers if layer.kind != "embedding")
    products = rounding_multiplications(layers, samples) * multiplication_seconds
    return _NOT_PRODUCTS * products + _COLUMN_SECONDS * columns


def rounding_multiplications(layers: Sequence[Layer], samples: int) -> float:
    """Multiplications of error feedback for a whole network, but for its passes.

    With c columns, o outputs and t positions that are looked at: t (c² + 2 o c) for the moments, two factors and a
    triangular inverse of c³ / 3 each, and c² o for feedback and for each sweep of the descent.

    Args:
        layers: The layers, counted on a batch.
        samples: Samples that rounding is fitted to.

    Example:
        >>> layer = Layer("", "linear", (10, 100), macs=1000, calls=1)
        >>> f"{rounding_multiplications([layer], 50):.1e}"
        '3.3e+06'
    """
    total = 0.0
    for layer in layers:
        if layer.kind == "embedding":
            continue
        outputs = layer.channels / layer.groups
        columns = layer.weights / layer.channels
        positions = min(samples * max(layer.macs / layer.weights, 1.0), float(most_columns(samples)))
        moments = positions * columns * (columns + min(2 * outputs, columns))
        factors = _DOUBLE * columns**3
        total += layer.groups * (moments + factors + (1 + _SWEEPS) * columns**2 * outputs)
    return total
