"""CAQ with the theorem's bound in place of the measured error (CAQ 2.2 and 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.composition import layer_error_bound
from lightning_caq.allocation.methods import caq
from lightning_caq.allocation.tables import layer_column
from lightning_caq.profile import CurvatureProfile


class Method(caq.Method):
    """Cost (A_i ε_i(b))², ε_i(b) = (L_i ‖z_i‖ + ‖f_i(z_i)‖) 2^−b + ρ_i ‖z_i‖² 2^−2b.

    ε_i(b) bounds the error of a layer whose input and output are rounded to b bits of mantissa: rounding error of the
    input carried through the layer, rounding error of the output, and what the layer bends in between. The proposal's
    theorem prints ≥, its proof gives ≤. The remainder ρ_i stands where the proposal has κ_i: κ_i is a curvature of
    ‖f‖² and has another unit (docs/measures.md). Nothing is rounded; of the weights the bound knows L_i only. Floors
    are those of ``caq``.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 1, 1, 1, lipschitz=3.0, input_norm=2.0, output_norm=2.0, remainder=1.0,
        ...                      amplification=0.5)
        >>> Method().costs(CurvatureProfile((row,)), [1])  # (½ · (8 / 2 + 4 / 4))²
        array([[6.25]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"kappa", "lipschitz", "inputs", "amplification"})

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = (A_i ε_i(b))²."""
        bounds = layer_error_bound(
            bits,
            lipschitz=layer_column(profile, "lipschitz"),
            input_norm=layer_column(profile, "input_norm"),
            output_norm=layer_column(profile, "output_norm"),
            remainder=layer_column(profile, "remainder"),
        )
        costs: NDArray[np.float64] = (layer_column(profile, "amplification")[:, None] * bounds) ** 2
        return costs
