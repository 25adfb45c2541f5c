"""Tables: figures of a profile as arrays, with a clear word where something was not measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_caq.errors import OptionError
from lightning_caq.profile import CurvatureProfile


def layer_column(profile: CurvatureProfile, figure: str) -> NDArray[np.float64]:
    """One figure of every layer, such as its trace.

    Args:
        profile: What was measured.
        figure: A field of ``LayerCurvature`` that holds a number, or the name of one in its ``extra``.

    Returns:
        Shape (layers,), in the figure's unit.

    Raises:
        OptionError: If it was not measured of some layer.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> layer_column(CurvatureProfile((LayerCurvature("fc", 1, 1, 1, trace=2.0),)), "trace")
        array([2.])
    """
    values = [row.figure(figure) for row in profile.layers]
    if None in values:
        raise _missing(figure, profile.layers[values.index(None)].name)
    return np.array(values, dtype=np.float64)


def layer_table(profile: CurvatureProfile, figure: str, bits: Sequence[int]) -> NDArray[np.float64]:
    """One figure of every layer at every bit-width, such as its rounding error.

    Args:
        profile: What was measured.
        figure: A field of ``LayerCurvature`` that maps bits to numbers, or the name of one in its ``extra``.
        bits: The bit-widths.

    Returns:
        Shape (layers, bit-widths), in the figure's unit.

    Raises:
        OptionError: If it was not measured of some layer at one of the bit-widths.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> layer_table(CurvatureProfile((LayerCurvature("fc", 1, 1, 1, kl={2: 0.5, 4: 0.1}),)), "kl", [2, 4])
        array([[0.5, 0.1]])
    """
    for row in profile.layers:
        lacking = [b for b in bits if b not in (row.figure(figure) or {})]
        if lacking:
            raise _missing(figure, row.name, f" at {lacking[0]} bits")
    return np.array([[row.figure(figure)[b] for b in bits] for row in profile.layers], dtype=np.float64)


def _missing(figure: str, layer: str, where: str = "") -> OptionError:
    return OptionError(
        f"'{figure}' of layer '{layer}' was not measured{where}; measure with the method's needs and the same bits."
    )
