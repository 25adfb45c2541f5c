"""MCKP: the quadratic form of the true rounding error (Chen, Wang and Cheng 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_caq.allocation.tables import layer_table
from lightning_caq.profile import CurvatureProfile


class Method:
    """Cost ½ Δ_i(b)ᵀ H_ii Δ_i(b), in nat: the second-order loss change of rounding this layer alone.

    "Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization" writes the form with a
    Gauss–Newton matrix and solves the multiple-choice knapsack greedily; here the solver is exact. A form below zero,
    which the full Hessian of a task loss may give, counts as zero: Gauss–Newton's never is.

    Example:
        >>> from lightning_caq.profile import LayerCurvature
        >>> row = LayerCurvature("fc", 4, 1, 4, second_order={2: 3.0, 4: -0.1})
        >>> Method().costs(CurvatureProfile((row,)), [2, 4])
        array([[1.5, 0. ]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"subspace"})
    in_nat: ClassVar[bool] = True

    def costs(self, profile: CurvatureProfile, bits: Sequence[int]) -> NDArray[np.float64]:
        """cost[i, b] = ½ Δᵀ H_ii Δ."""
        return np.maximum(0.5 * layer_table(profile, "second_order", bits), 0)
