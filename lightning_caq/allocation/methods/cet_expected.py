"""CET with expected energies: what rounding costs on average over the directions of its error (CET §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_column, layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost ½ (c_i / n_i + μ) ‖Δ_i(b)‖², in nat, c_i = Σ_j |λ_j| ‖v_j restricted to the layer‖².

    The mean of Σ_j |λ_j| (v_jᵀ Δ)² over errors Δ of the size ‖Δ_i(b)‖ in a direction that is uniform in the layer. Its
    sister ``cet`` takes the direction of the real error, and measures where the quadratic model fails.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", weights=4, channels=1, macs=4, subspace_curvature=8.0, rounding_error={2: 0.5})
        >>> Method().costs(CurvatureProfile((row,), residual_curvature=1.0), [2])
        array([[0.75]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rounding_error", "subspace"})
    in_nat: ClassVar[bool] = True

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] in nat."""
        mu = profile.residual_curvature or 0.0
        means = layer_column(profile, "subspace_curvature") / layer_column(profile, "weights") + mu
        return 0.5 * means[:, None] * layer_table(profile, "rounding_error", bits)
