"""HAWQ: the steepest direction of each layer (Dong et al. 2019, "HAWQ: Hessian AWare Quantization")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost |λ_max(H_ii)| · ‖Δ_i(b)‖², in nat: twice the loss change if the whole error lay in the steepest direction.

    HAWQ ranks layers by λ_max(H_ii) / n_i, leaves the bit-widths to be chosen by hand in that order, and orders the
    fine-tuning by λ_max ‖Δ_i‖². The latter tells bit-widths apart, and so is the table here; what HAWQ leaves to the
    hand is left to the solver.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, top_eigenvalue=3.0, rounding_error={2: 0.5})
        >>> Method().costs(CurvatureProfile((row,)), [2])
        array([[1.5]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"top_eigenvalue", "rounding_error"})
    unit: ClassVar[str] = "nat"

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = |λ_max(H_ii)| ‖Δ_i(b)‖²."""
        steepest = np.abs(layer_column(profile, "top_eigenvalue"))
        return steepest[:, None] * layer_table(profile, "rounding_error", bits)
