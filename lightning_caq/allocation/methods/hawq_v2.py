"""HAWQ-v2: the mean curvature of each layer (Dong et al. 2020, "Hessian Aware trace-Weighted Quantization")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost Ω_i(b) = tr(H_ii) / n_i · ‖Δ_i(b)‖², in nat: twice the loss change of an error in a random direction.

    HAWQ-v2 takes the Hessian to be positive semidefinite; a trace that is measured below zero, which a task loss may
    have, counts as zero.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", weights=4, channels=1, macs=4, trace=12.0, rounding_error={2: 0.5})
        >>> Method().costs(CurvatureProfile((row,)), [2])
        array([[1.5]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"trace", "rounding_error"})
    unit: ClassVar[str] = "nat"

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = tr(H_ii) / n_i · ‖Δ_i(b)‖²."""
        means = np.maximum(layer_column(profile, "trace"), 0) / layer_column(profile, "weights")
        return means[:, None] * layer_table(profile, "rounding_error", bits)
