"""CET: rounding errors as energy in the steep directions of the loss (CET §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.measures.profile import CurvatureProfile


class Method:
    """Cost: the loss change that the profile predicts, in nat, and no less than zero.

    That is gᵀΔ + ½ (energy of the rounding error in the short-axis subspace S + μ ‖Δ_i(b)‖²). Where the quadratic model
    fails (CET Eq. 7: its prediction and the measured loss change differ by more than the tolerance) the measured change
    is the cost instead. A predicted gain counts as no cost: it holds for the calibration samples, if at all.

    Example:
        >>> from lightning_caq.measures.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, rounding_error={2: 0.5, 3: 0.1}, subspace_energy={2: 3.0, 3: 0.6},
        ...                      loss_change={2: 7.0}, outside=(2,))
        >>> Method().costs(CurvatureProfile((row,), residual_curvature=2.0), [2, 3]).round(6)
        array([[7. , 0.4]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rounding_error", "subspace", "loss_change"})

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] in nat."""
        changes = [[profile.predicted_change(row.name, b) for b in bits] for row in profile.layers]
        return np.array(changes, dtype=np.float64).clip(min=0.0)
