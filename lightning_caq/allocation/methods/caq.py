"""CAQ: errors of the layers, carried to the output (CAQ 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.composition import precision_floor
from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost (A_i(b) e_i(b))²: the square of the output error that layer i's rounding causes.

    e_i(b) is the measured error of the layer's output and A_i(b) its amplification up to the network's output, along
    that very error. The sum of the costs is Φ_rss², the composed error of independent layer errors (CAQ 2.3).

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", weights=1, channels=1, macs=1, carried_error={2: 2.0})
        >>> Method().costs(CurvatureProfile((row,)), [2])
        array([[4.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"amplification", "kappa", "inputs"})
    unit: ClassVar[str] = "out²"

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = (A_i(b) e_i(b))²."""
        costs: NDArray[np.float64] = layer_table(profile, "carried_error", bits) ** 2
        return costs

    def floors(self, profile: CurvatureProfile, epsilon: float) -> NDArray[np.float64]:
        """p*_i, the bits that each layer needs for an error ε, shape (layers,) (CAQ 2.4, step 1d)."""
        return precision_floor(layer_column(profile, "remainder"), layer_column(profile, "diameter"), epsilon)
