"""CET: rounding errors as energy in the steep directions of the loss (CET §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.profile import CurvatureProfile, LayerCurvature


class Method:
    """Cost ½ (energy of the rounding error in the short-axis subspace S + μ ‖Δ_i(b)‖²), in nat.

    The energy is that of the real rounding error, Σ_j |λ_j| (v_jᵀ Δ_i)². Where the quadratic model fails (CET Eq. 7:
    its prediction and the measured loss change differ by more than the tolerance) the measured change is the cost
    instead, and no cost if the loss falls: that holds for the calibration samples, if at all.

    Example:
        >>> row = LayerCurvature("fc", 4, 1, 4, rounding_error={2: 0.5, 3: 0.1}, subspace_energy={2: 3.0, 3: 0.6},
        ...                      loss_change={2: 7.0}, outside=(2,))
        >>> Method().costs(CurvatureProfile((row,), residual_curvature=2.0), [2, 3]).round(6)
        array([[7. , 0.4]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rounding_error", "subspace", "loss_change"})
    in_nat: ClassVar[bool] = True

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] in nat."""
        mu = profile.residual_curvature or 0.0
        return np.array([[_cost(row, b, mu) for b in bits] for row in profile.layers], dtype=np.float64)


def _cost(row: LayerCurvature, b: int, mu: float) -> float:
    if b in row.outside:
        return max(row.loss_change[b], 0.0)
    return 0.5 * (row.subspace_energy[b] + mu * row.rounding_error[b])
