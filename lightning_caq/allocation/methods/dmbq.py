"""DMBQ-style: how much rounding changes the distribution of the weights (after Zhao, Yue and Hu 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost n_i · JS_i(b), in nat: the Jensen–Shannon divergence of float and rounded weights, for all weights together.

    "Distribution-aware adaptive multi-bit quantization" looks for quantizers in the space of distributions before it
    trains, which is what this follows. It is no reproduction: its quantizers are multi-bit binary, and its bit-widths
    are adapted while training, by a first-order expansion of the loss (``gradient_norm`` is close to that).

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", weights=4, channels=1, macs=4, distribution_distance={2: 0.5, 4: 0.125})
        >>> Method().costs(CurvatureProfile((row,)), [2, 4])
        array([[2. , 0.5]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"distribution_distance"})
    unit: ClassVar[str] = "nat"

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = n_i JS_i(b)."""
        return layer_column(profile, "weights")[:, None] * layer_table(profile, "distribution_distance", bits)
